"""The devices that a plan can be made for: how much they hold and how fast they multiply."""

import dataclasses
import os
from collections.abc import Mapping

import jax

from efx_jax.errors import InputError

USABLE_SHARE = 0.92
"""Share of a GPU's memory that a run gets, see `memory_settings`."""

_GIB = 2**30
# Memory as the driver reports it, in GiB, and the dense bfloat16 peak in TFLOP/s (NVIDIA data sheets).
_NAMED: dict[str, tuple[float, float]] = {
    "b200": (178, 2250),
    "h200": (139, 989),
    "h100": (79, 989),
    "a100": (79, 312),
    "a100-40": (39, 312),
    "l40s": (44, 362),
    "a10g": (22, 70),
    "rtx4090": (23.5, 165),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: for a line of text.
        memory: bytes that a run may use.
        peak: bfloat16 FLOP/s, dense; None if unknown.
        gpu: whether it has the GPU's attention kernels.
    """

    name: str
    memory: int
    peak: float | None
    gpu: bool


def memory_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that let XLA use `USABLE_SHARE` of every GPU's memory, and all of the host's.

    The defaults are 0.75 and 64 GB; the host holds an event's average of scores, and checkpoints on their way to disk.
    Set them before anything touches a device. Variables that `environment` already sets are left out.
    """
    settings = {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": str(max(1, _host_memory() // 10**9))}
    # XLA refuses it together with its older name.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:
        settings["XLA_CLIENT_MEM_FRACTION"] = str(USABLE_SHARE)
    return {name: value for name, value in settings.items() if name not in environment}


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def find_device(name: str, places: int) -> Device:
    """The device that a plan is for.

    Args:
        name: a known name, a number of GiB per device, or "" for the local device.
        places: number of devices in the mesh, which on a CPU share the host's memory.

    Raises:
        InputError: an unknown name.
    """
    wanted = name.strip().lower()
    if not wanted:
        return _at_hand(places)
    if wanted in _NAMED:
        gib, tflops = _NAMED[wanted]
        return Device(wanted, int(gib * _GIB * USABLE_SHARE), tflops * 1e12, gpu=True)
    try:
        gib = float(wanted)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 1e6:
        raise InputError(
            f"mesh.device: {name!r} is not known; expected one of {', '.join(_NAMED)}, or GiB per device such as 80"
        )
    return Device(f"{gib:g} GiB", int(gib * _GIB * USABLE_SHARE), None, gpu=True)


def _at_hand(places: int) -> Device:
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return Device("cpu", _host_memory() // places, None, gpu=False)
    kind = device.device_kind.lower().replace(" ", "")
    known = next((name for name in _NAMED if name in kind), None)
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    peak = _NAMED[known][1] * 1e12 if known else None
    return Device(device.device_kind, int(limit), peak, gpu=device.platform == "gpu")
