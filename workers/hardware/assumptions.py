"""What the roofline assumes beyond peaks, in one place.

A peak is a fact about a device; how much of it an engine reaches, and what a pass costs
that moves nothing, are facts about the engine on it. They are fitted or rough, so they
stand here with their grounds instead of being mixed into the device catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.hardware.device import CPU, Device


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """How an engine does on a kind of device."""

    bandwidth_share: float
    """Share of the peak bandwidth that weights and cache are read at."""
    compute_share: float
    """Share of the peak FLOP rate that matrix products run at."""
    step_s: float
    """Scheduling and sampling of one forward pass, seconds."""
    layer_s: float
    """Launches of one layer, seconds."""
    request_s: float
    """Admission of one request and what its prompt costs besides its tokens, seconds."""
    rebuild_s: float
    """Building an engine apart from its weights, seconds."""
    close_s: float
    """Ending an engine and proving its device clean, seconds."""
    load_gib_s: float
    """Rate at which weights come up, GiB per second."""
    overhead_gib: float
    """Memory of contexts, communication buffers and captured graphs, GiB per device."""


_CPU = Assumptions(
    bandwidth_share=0.75,
    compute_share=0.55,
    step_s=2e-3,
    layer_s=5e-4,
    request_s=1.2e-3,
    rebuild_s=1.3,
    close_s=1.8,
    load_gib_s=0.25,
    overhead_gib=0.0,
)
"""Fitted to vLLM's eager CPU engine on one machine of 2 cores: the 52 points of the CPU profile
of `sweeps/hparam.yaml` and a checkpoint of 30 layers at batch 1 to 32."""

_GPU = Assumptions(
    bandwidth_share=0.7,
    compute_share=0.5,
    step_s=1e-3,
    layer_s=2e-5,
    request_s=2e-4,
    rebuild_s=60.0,
    close_s=5.0,
    load_gib_s=2.0,
    overhead_gib=1.5,
)
"""Rough, and not fitted: nothing of this project has run on a GPU. 0.7 is the S-MBU that the
bandwidths of MoE-CAP §4.3 imply."""


def assumptions(device: Device) -> Assumptions:
    """What is assumed for a device."""
    return _CPU if device.name == CPU else _GPU
