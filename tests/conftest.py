"""Keeps every test closed to the outside: no usage report, no hub, no open Ray port.

Set here, before any test imports Ray or vLLM, because both read their environment once;
the processes that tests start inherit it. A token of this session's own keeps Ray from
writing one into the home folder and from joining a cluster that is not ours.
"""

from __future__ import annotations

import os
import secrets

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
