"""Models and devices of the catalogues by name, with an answer for a name that is wrong.

Figures and planner compute from what is returned here: the architecture, and how many
bytes its weights take when they are stored as asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.errors import OptionError, unknown
from workers.contract.errors import Infeasible
from workers.contract.model import Dtype, Model
from workers.hardware.device import Device, UnknownDevice, device, devices, names
from workers.moe import hub
from workers.moe.architecture import (
    UnknownModel,
    Unread,
    catalogue,
    catalogue_name,
    configuration,
    resolve,
)
from workers.moe.families import unspelled
from workers.moe.partial import Partial, partial
from workers.moe.precision import Precision, precision
from workers.moe.storage.found import without
from workers.moe.structure import Architecture

AUTO = "auto"
DTYPES: dict[str, tuple[Dtype, str | None]] = {
    "bf16": ("bfloat16", None),
    "fp16": ("float16", None),
    "fp32": ("float32", None),
    "fp8": ("bfloat16", "fp8"),
    "int8": ("bfloat16", "int8"),
    "mxfp4": ("bfloat16", "mxfp4"),
}
"""Ways to store weights, as (data type, quantisation that the engine applies on loading).
Beside them `auto`: as the checkpoint is, its own quantisation included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """A model, and how it is stored."""

    name: str
    """As the catalogue has it; a folder outside it."""
    architecture: Architecture
    precision: Precision
    dtype: str
    """How its weights are stored, in a word: `bf16`, `fp8`, `gptq`."""


def structure(name: str, dtype: str = AUTO) -> Structure:
    """The model of that name (catalogue, folder, hub id), stored as `dtype` says.

    Raises:
        OptionError: no such model or dtype, its configuration is not on this machine or
            cannot be read, or its parameters are not known exactly.
    """
    a = architecture(name)
    if dtype == AUTO:
        model = Model(name=name, dtype="auto")
    elif dtype in DTYPES:
        a = replace(a, config=without(a.config))
        run, quantization = DTYPES[dtype]
        model = Model(name=name, dtype=run, quantization=quantization)
    else:
        raise OptionError(unknown("dtype", dtype, [AUTO, *DTYPES]))
    try:
        stored = precision(a, model)
    except ValueError as error:
        raise OptionError(f"model {name}: {error}") from error
    return Structure(
        name=catalogue_name(name) or name,
        architecture=a,
        precision=stored,
        dtype=_word(stored, dtype),
    )


def architecture(name: str) -> Architecture:
    """The architecture of the model of that name.

    Raises:
        OptionError: as `structure`.
    """
    found = known(name)
    if isinstance(found, Partial):
        raise OptionError(f"model {name}: {found.reason}")
    return found


def known(name: str) -> Architecture | Partial:
    """What is known of the model of that name: its architecture where the family is spelled out,
    else the dimensions that are plain in its configuration, and why there is no more.

    Raises:
        OptionError: no such model, or its configuration is not on this machine or no JSON.
    """
    try:
        found = resolve(Model(name=name, weights="dummy"))
    except Unread as error:
        return partial(configuration(name) or {}, str(error))
    except UnknownModel as error:
        if "/" in name or Path(name).exists():
            raise OptionError(str(error)) from error
        raise OptionError(unknown("model", name, catalogue())) from error
    except (Infeasible, ValueError) as error:
        raise OptionError(f"model {name}: {error}") from error
    if found is None:
        raise OptionError(hub.absent(name))
    if not found.exact:
        reason = f"{unspelled(found.config)}, so its parameters would be a guess"
        return partial(found.config, reason)
    return found


def listed(chosen: Sequence[str]) -> tuple[Device, ...]:
    """The devices that are named (`cpu` is this machine), in that order; the whole
    catalogue where none is.

    Raises:
        OptionError: for a name that is not there.
    """
    if not chosen:
        return devices()
    try:
        return tuple(dict.fromkeys(device(name) for name in chosen))
    except UnknownDevice as error:
        wrong = next(name for name in chosen if name not in names())
        raise OptionError(unknown("device", wrong, names())) from error


def _word(stored: Precision, dtype: str) -> str:
    if dtype != AUTO:
        return dtype
    if stored.scheme is not None:
        return stored.scheme.method
    plain = (
        word for word, (run, method) in DTYPES.items() if method is None and run == stored.dtype
    )
    return next(plain, stored.dtype)
