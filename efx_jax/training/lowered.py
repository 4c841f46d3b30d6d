"""The training step compiled from shapes alone: what XLA says it needs, without any weights in memory."""

import contextlib
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efx_jax.config import Config
from efx_jax.lora import init_lora
from efx_jax.masks import mask_shapes
from efx_jax.model.attention import Implementation, choose_attention
from efx_jax.model.spec import ModelSpec, param_shapes
from efx_jax.parallel.mesh import make_mesh, mesh_size, mesh_sizes
from efx_jax.parallel.partition import batch_axes, placed_shapes
from efx_jax.training.activations import Layout
from efx_jax.training.feed import packed_pass
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import init_train_state
from efx_jax.training.step import Teacher, has_teacher, jit_step, step_options, train_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """XLA's figures for one device.

    Attributes:
        platform: what it was compiled for.
        arguments: bytes of weights, masks, adapters, optimizer state and batch.
        temporaries: bytes of everything in between, at the peak.
        seconds: time taken to trace and compile.
    """

    platform: str
    arguments: int
    temporaries: int
    seconds: float


def compile_step(spec: ModelSpec, config: Config, layout: Layout) -> Compiled:
    """Compiles the step of a run for the available backend; a CPU simulates as many devices as the mesh needs.

    Args:
        spec: the model.
        config: the run.
        layout: weights' dtype, row length, and whether there are masks.

    Raises:
        InputError: too few devices, and too late to simulate them.
    """
    start = time.perf_counter()
    simulate_devices(mesh_size(config.mesh))
    mesh = make_mesh(config.mesh, _devices(mesh_size(config.mesh)))
    with jax.set_mesh(mesh):
        arguments = step_arguments(spec, config, layout, mesh)
        state = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
        step = train_step if mesh.size == 1 else jit_step((state, NamedSharding(mesh, PartitionSpec())))
        compiled = step.lower(*arguments).compile()
    analysis: Any = compiled.memory_analysis()
    return Compiled(
        platform=mesh.devices.flat[0].platform,
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


def simulate_devices(count: int) -> None:
    """Makes the CPU appear as `count` devices, if nothing has touched a device yet; for plans only, not for runs."""
    if count > 1:
        # Too late once a backend is up: `make_mesh` then reports what is available and what would have helped.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def _devices(count: int) -> list[jax.Device]:
    """The available devices, or the CPU's simulated ones if those are too few."""
    devices = jax.devices()
    if len(devices) >= count:
        return devices
    try:
        return jax.devices("cpu")
    except RuntimeError:  # JAX_PLATFORMS excludes it
        return devices


def step_arguments(spec: ModelSpec, config: Config, layout: Layout, mesh: Mesh) -> tuple[Any, ...]:
    """The arguments of `train_step`, with shapes, dtypes and shardings in place of arrays."""
    tx = optimizer(config.train, max(1, config.train.steps))
    lora = config.lora

    def init(params: Any) -> Any:
        adapters = init_lora(jax.random.key(0), params, spec, lora.rank, lora.alpha, lora.targets, lora.rslora)
        return init_train_state(adapters, tx)

    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, layout.dtype),
        param_shapes(spec),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    placed = placed_shapes(mesh, params)
    # A mesh that is larger than this machine is simulated on its CPU, whatever other devices it has.
    attention_path: Implementation = "xla"
    if mesh.devices.flat[0].platform != "cpu":
        attention_path = choose_attention(spec, config.model.compute_dtype, packed=packed_pass(config))
    return (
        placed_shapes(mesh, jax.eval_shape(init, params)),
        placed,
        placed_shapes(mesh, mask_shapes(params["layers"], config.prune.targets)) if layout.events else None,
        _batch(config, layout, mesh),
        jax.eval_shape(lambda: jax.random.key(0)),
        spec,
        tx,
        step_options(config, layout.rows, attention_path),
        # A teacher of another size is planned as one of the model's.
        Teacher(placed, spec) if has_teacher(config) and layout.events else None,
    )


def _batch(config: Config, layout: Layout, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    rows = config.train.batch_size
    place = NamedSharding(mesh, PartitionSpec(batch_axes(rows, mesh_sizes(config.mesh)) or None))
    kinds: dict[str, Any] = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.batching == "packing":
        kinds |= {"positions": jnp.int32, "segments": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct((rows, layout.length), kind, sharding=place) for name, kind in kinds.items()}
    return batch | {"lengths": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=place)}
