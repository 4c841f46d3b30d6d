"""The mesh `data` x `fsdp` x `tensor`."""

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from efx_jax.config import MeshConfig
from efx_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the first data * fsdp * tensor devices.

    Axis types are Auto: sorting and top-k over a sharded axis fail under Explicit.

    Raises:
        InputError: fewer devices than the mesh needs, or processes none of whose devices it would use.
    """
    devices = jax.devices() if devices is None else devices
    size = mesh_size(config)
    if size > len(devices):
        on_cpu = devices[0].platform == "cpu"
        advice = f", or simulate devices by JAX_NUM_CPU_DEVICES={size}" if on_cpu else ""
        raise InputError(
            f"mesh: data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} needs {size} devices, found "
            f"{len(devices)} of {devices[0].device_kind}; lower one of them{advice}"
        )
    chosen = devices[:size]
    idle = sorted({device.process_index for device in devices} - {device.process_index for device in chosen})
    if idle:
        raise InputError(
            f"mesh: {size} of {len(devices)} devices leave process {idle[0]} without any; start fewer processes or use "
            "all devices"
        )
    shape = (config.data, config.fsdp, config.tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=chosen)


def mesh_size(config: MeshConfig) -> int:
    """Number of devices that the mesh uses."""
    return config.data * config.fsdp * config.tensor


def mesh_sizes(config: MeshConfig) -> dict[str, int]:
    """Number of devices along each axis."""
    return dict(zip(AXES, (config.data, config.fsdp, config.tensor), strict=True))


def active_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` if it has our axes and several devices, else None: none of our arrays are sharded."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and mesh.axis_names == AXES and mesh.size > 1 else None
