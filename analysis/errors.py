"""What a reader can get wrong, as exceptions that fit on one line.

    AnalysisError
    ├── DatasetError     a file or folder that is not what it should be; the message names it
    ├── SelectionError   the records do not answer the question: mixed conditions, none left
    └── OptionError      a model, a device or a number that cannot be computed with

All come from the user's input, hence ValueError. The command line prints the message and
ends with status 2; every other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AnalysisError(ValueError):
    """The user's input cannot be used."""


class DatasetError(AnalysisError):
    """A folder or file that cannot be read as part of a dataset."""


class SelectionError(AnalysisError):
    """The chosen records do not fit what was asked of them."""


class OptionError(AnalysisError):
    """An option that names nothing, or that what was asked has no place for."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`no WHAT 'NAME'`, with the nearest known name where there is one."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"no {what} {name!r}; {hint}"
