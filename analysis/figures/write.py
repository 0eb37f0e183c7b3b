"""A figure as a file, in the format that its suffix names.

altair describes the chart and vl-convert draws it in process: no browser, no network. An
HTML page carries its own JavaScript. Files are written whole and renamed into place.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from analysis.errors import AnalysisError, unknown
from analysis.figures.figure import Figure

if TYPE_CHECKING:
    import altair as alt

_PNG_SCALE = 2
"""Pixels per CSS pixel: sharp on paper and on dense screens."""


class _InScript(json.JSONEncoder):
    """JSON that cannot close the script element it stands in, whatever a record says."""

    def encode(self, o: Any) -> str:
        return super().encode(o).replace("<", "\\u003c")


def _chart(figure: Figure, frame: pl.DataFrame) -> alt.TopLevelMixin:
    """The picture. altair would check every part as it is made, which takes longer than making
    it; writing checks the whole once."""
    from altair.utils.schemapi import debug_mode

    with debug_mode(False):
        return figure.chart(frame)


def _csv(figure: Figure, frame: pl.DataFrame) -> bytes:
    return frame.write_csv().encode()


def _html(figure: Figure, frame: pl.DataFrame) -> bytes:
    actions = {"export": True, "source": False, "compiled": False, "editor": False}
    page: str = _chart(figure, frame).to_html(
        inline=True, embed_options={"actions": actions}, json_kwds={"cls": _InScript}
    )
    return page.encode()


def _svg(figure: Figure, frame: pl.DataFrame) -> bytes:
    text = io.StringIO()
    _chart(figure, frame).save(text, format="svg")
    return text.getvalue().encode()


def _png(figure: Figure, frame: pl.DataFrame) -> bytes:
    data = io.BytesIO()
    _chart(figure, frame).save(data, format="png", scale_factor=_PNG_SCALE)
    return data.getvalue()


FORMATS: dict[str, Callable[[Figure, pl.DataFrame], bytes]] = {
    ".png": _png,
    ".svg": _svg,
    ".html": _html,
    ".csv": _csv,
}
"""Renderers by suffix."""


def check(path: Path) -> None:
    """Raises AnalysisError for a suffix that is no format, or a folder that is not there."""
    if path.suffix.lower() not in FORMATS:
        raise AnalysisError(f"{path}: {unknown('format', path.suffix or path.name, FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise AnalysisError(f"{path}: there is no folder {path.absolute().parent}")


def write(figure: Figure, frame: pl.DataFrame, path: Path) -> None:
    """Write a prepared frame as `path`'s suffix asks: .png, .svg, .html or .csv.

    Raises:
        AnalysisError: as `check`, and where the file cannot be written.
    """
    check(path)
    data = FORMATS[path.suffix.lower()](figure, frame)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise AnalysisError(f"{path}: cannot be written ({error.strerror})") from error
