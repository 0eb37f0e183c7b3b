"""Frames, figures and tables of what was measured. `from analysis import load` starts here.

Nothing is imported until `load` is asked for, so `python -m analysis --help` stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.dataset import load as load


def __getattr__(name: str) -> Any:
    if name == "load":
        from analysis.dataset import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
