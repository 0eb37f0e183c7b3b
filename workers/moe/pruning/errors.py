"""What pruning refuses."""

from __future__ import annotations


class PruneError(ValueError):
    """What the user gave cannot be pruned; the message says why."""
