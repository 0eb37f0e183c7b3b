"""What can be asked of a computation from the catalogues, checked where it is born.

One value for figures and planner alike. A field left empty means "not asked"; `over` fills
it from defaults and refuses what is not taken, so an option can never be given and
silently ignored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from analysis.errors import OptionError

FLAGS = {
    "models": "--model",
    "devices": "--device",
    "batches": "--batch",
    "tpot_s": "--tpot",
    "context": "--context",
    "dtype": "--dtype",
    "s_mbu": "--s-mbu",
    "s_mfu": "--s-mfu",
}
"""Fields as the command line spells them."""
_SHORTEST_S, _LONGEST_S = 1e-9, 1e9
_LEAST_SHARE = 1e-6
_MOST = 2**40
"""Limits that no service comes near, within which every figure is a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Models, devices and the service that they are to give."""

    models: tuple[str, ...] = ()
    """Catalogue names, folders or hub ids."""
    devices: tuple[str, ...] = ()
    """Device classes of the catalogue."""
    batches: tuple[int, ...] = ()
    """Sequences that are decoded together."""
    tpot_s: float | None = None
    """Longest time per output token, seconds."""
    context: int | None = None
    """Tokens of each sequence that are in the KV cache."""
    dtype: str | None = None
    """How weights are stored; see `analysis.structures.DTYPES`."""
    s_mbu: float | None = None
    """Share of a device's peak bandwidth that is reached, 0 < s_mbu ≤ 1 (Eq 7)."""
    s_mfu: float | None = None
    """Share of a device's dense peak FLOP/s that is reached, 0 < s_mfu ≤ 1 (Eq 8)."""

    def __post_init__(self) -> None:
        for batch in self.batches:
            if not 1 <= batch <= _MOST:
                limit = f"at most {_MOST:,} sequences" if batch > 1 else "at least one sequence"
                raise OptionError(f"--batch {_short(batch)}: a batch has {limit}")
        if self.tpot_s is not None and not _SHORTEST_S <= self.tpot_s <= _LONGEST_S:
            raise OptionError(
                f"--tpot {self.tpot_s:g}: a time above 0 seconds is needed, "
                f"from {_SHORTEST_S:g} to {_LONGEST_S:g}"
            )
        if self.context is not None and not 0 <= self.context <= _MOST:
            limit = f"at most {_MOST:,}" if self.context > 0 else "not negative"
            raise OptionError(f"--context {_short(self.context)}: a number of tokens is {limit}")
        for flag, share in (("--s-mbu", self.s_mbu), ("--s-mfu", self.s_mfu)):
            if share is not None and not _LEAST_SHARE <= share <= 1:
                raise OptionError(
                    f"{flag} {share:g}: a share above 0 and up to 1 is needed, "
                    f"at least {_LEAST_SHARE:g}"
                )

    def over(
        self, defaults: Options, *, takes: Collection[str] = tuple(FLAGS), what: str = ""
    ) -> Options:
        """These, and `defaults` where nothing was asked.

        Raises:
            OptionError: for an option that is not among the fields `takes` of `what`.
        """
        asked = {name: value for name in FLAGS if (value := getattr(self, name)) not in ((), None)}
        for name in asked:
            if name not in takes:
                listed = ", ".join(FLAGS[one] for one in FLAGS if one in takes)
                hint = f"; it takes {listed}" if listed else ""
                raise OptionError(f"{what} takes no {FLAGS[name]}{hint}")
        return replace(defaults, **asked)


def _short(number: int) -> str:
    """The number, or of one that fills lines its beginning."""
    digits = str(number)
    return digits if len(digits) <= 30 else f"{digits[:10]}… ({len(digits)} digits)"
