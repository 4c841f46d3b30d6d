"""What the compiled step sends between devices: adapters and activations, never a matrix."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efx_jax.config import MeshConfig, TrainConfig
from efx_jax.lora import init_lora
from efx_jax.masks import packed_shape
from efx_jax.model.generate import generate
from efx_jax.model.spec import LINEARS, init_params, linear_shapes
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import BATCH, tree_shardings
from efx_jax.training.distillation import take_rows
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import init_train_state
from efx_jax.training.step import StepOptions, jit_step
from tests.tiers import few_of
from tests.tiny import EVEN

# No activation, adapter or part of one has two neighbouring axes that a matrix or a part of one has.
SPEC = dataclasses.replace(EVEN, vocab_size=256, hidden_size=80, intermediate_size=112, head_dim=12)
ROWS, LENGTH, RANK = 8, 36, 3
MESHES = [(2, 2, 1), (2, 2, 2)]
_REDUCTION = re.compile(r" = (.*?) (all-reduce|all-reduce-start|reduce-scatter|reduce-scatter-start)\((.*)")
_SHAPE = re.compile(r"\b[a-z]+\d+\w*\[([\d,]+)\]")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """Nothing is left out here: read is the program that would run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def matrix_shapes(mesh: Mesh) -> tuple[set[tuple[int, int]], set[int]]:
    """Shapes of the seven matrices, of their parts on the mesh and of what is transposed; and their sizes."""
    subsets = itertools.chain.from_iterable(itertools.combinations(mesh.shape.values(), n) for n in range(4))
    parts = {int(np.prod(subset, dtype=int)) for subset in subsets}
    shapes = set()
    for out_dim, in_dim in linear_shapes(SPEC).values():
        for rows, columns in itertools.product(parts, parts):
            if out_dim % rows == 0 and in_dim % columns == 0:
                shapes |= {(out_dim // rows, in_dim // columns), (in_dim // columns, out_dim // rows)}
    return shapes, {rows * columns for rows, columns in shapes}


def reduced_shapes(hlo: str) -> Iterator[tuple[int, ...]]:
    """Shapes of the results and operands of every all-reduce and reduce-scatter, those inside tuples too."""
    for line in hlo.splitlines():
        found = _REDUCTION.search(line)
        if found:
            text = found[1] + found[3].split("replica_groups=")[0]
            yield from (tuple(map(int, dims.split(","))) for dims in _SHAPE.findall(text))


def reduced_matrices(hlo: str, mesh: Mesh) -> set[tuple[int, ...]]:
    """The reduced shapes that are a matrix: its two axes at the end, or flattened."""
    matrices, sizes = matrix_shapes(mesh)
    return {
        shape
        for shape in reduced_shapes(hlo)
        if any(pair in matrices for pair in itertools.pairwise(shape)) or (len(shape) == 1 and shape[0] in sizes)
    }


def compiled_step(mesh: Mesh, options: StepOptions) -> str:
    """The text of the compiled step, from shapes alone."""
    tx = optimizer(TrainConfig(), 10)

    def arrays() -> dict[str, Any]:
        params = init_params(jax.random.key(0), SPEC)
        state = init_train_state(init_lora(jax.random.key(1), params, SPEC, RANK), tx)
        masks = {name: jnp.zeros(packed_shape(params["layers"][name].shape), jnp.uint8) for name in LINEARS}
        return {"state": state, "params": params, "masks": masks}

    shapes = jax.eval_shape(arrays)
    shardings = tree_shardings(mesh, shapes)
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )

    def batch_leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(BATCH, *(None,) * (len(shape) - 1)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = {name: batch_leaf(jnp.int32, ROWS, LENGTH) for name in ("tokens", "targets")}
    batch |= {"weights": batch_leaf(jnp.float32, ROWS, LENGTH), "lengths": batch_leaf(jnp.int32, ROWS)}
    step = jit_step((shardings["state"], NamedSharding(mesh, PartitionSpec())))
    with jax.set_mesh(mesh):
        lowered = step.lower(
            placed["state"], placed["params"], placed["masks"], batch, jax.random.key(2), SPEC, tx, options
        )
        return lowered.compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("remat", few_of(["none", "linears"], "none"))
def test_the_exact_step_sums_no_matrix_over_devices(shape: tuple[int, int, int], remat: Any) -> None:
    mesh = make_mesh(MeshConfig(*shape))
    hlo = compiled_step(mesh, StepOptions(mask_forward="exact", remat=remat))
    assert not reduced_matrices(hlo, mesh)
    # The adapters' gradients are what is summed.
    in_dims = {in_dim // (mesh.shape["tensor"] if name in ("o_proj", "down_proj") else 1)
               for name, (_, in_dim) in linear_shapes(SPEC).items()}  # fmt: skip
    assert {(RANK, in_dim) for in_dim in in_dims} <= {found[-2:] for found in reduced_shapes(hlo)}


def test_rows_for_the_teacher_are_handed_over_a_part_of_their_positions_at_a_time() -> None:
    """Whole on a device is never more of all rows than it has of its own."""
    mesh = make_mesh(MeshConfig(2, 4, 1))
    rows, length, width = 32, 96, 20
    shared_out = NamedSharding(mesh, PartitionSpec(BATCH))
    hidden = np.random.default_rng(0).normal(size=(rows, length, width)).astype(np.float32)
    order = np.random.default_rng(1).normal(size=rows).astype(np.float32)
    expected = hidden[np.argsort(-order)[: rows // 2]]

    def taken(hidden: jax.Array, order: jax.Array) -> jax.Array:
        return take_rows(order, 0.5, {"hidden": hidden})["hidden"]

    def loss(hidden: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(taken(hidden, order)))

    with jax.set_mesh(mesh):
        found = jax.jit(taken, in_shardings=shared_out)(hidden, order)
        gradient = jax.jit(jax.grad(loss), in_shardings=shared_out, out_shardings=shared_out).lower(hidden, order)
    np.testing.assert_array_equal(found, expected)
    assert found.sharding.spec[0] == BATCH
    hlo = gradient.compile().as_text()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]\S* all-", hlo)]
    assert sizes and max(sizes) == rows // 8 * length * width


def test_what_is_written_is_whole_on_every_device() -> None:
    """Several hosts cannot read each other's rows."""
    params, lengths = init_params(jax.random.key(0), SPEC), np.full(4, 3, np.int32)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        assert generate(params, np.ones((4, 3), np.int32), lengths, SPEC, 2).sharding.is_fully_replicated


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_contraction_left_to_the_partitioner_is_caught(shape: tuple[int, int, int], dtype: str) -> None:
    """dA and dB of the exact mode as one would write them first."""
    mesh = make_mesh(MeshConfig(*shape))
    out_dim, in_dim = linear_shapes(SPEC)["gate_proj"]

    def leaf(spec: PartitionSpec, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = PartitionSpec(("tensor", "fsdp"), None)
    operands = (
        leaf(PartitionSpec(BATCH, None, "tensor"), dtype, ROWS, LENGTH, out_dim),
        leaf(PartitionSpec(BATCH, None, None), dtype, ROWS, LENGTH, in_dim),
        leaf(rows, bool, out_dim, in_dim),
        leaf(PartitionSpec(), jnp.float32, RANK, in_dim),
        leaf(rows, jnp.float32, out_dim, RANK),
    )

    def gradients(dy: jax.Array, x: jax.Array, mask: jax.Array, a: jax.Array, b: jax.Array) -> Any:
        d_u = jnp.where(mask, jnp.einsum("bto,bti->oi", dy, x, preferred_element_type=jnp.float32), 0)
        return jnp.einsum("or,oi->ri", b, d_u), jnp.einsum("oi,ri->or", d_u, a)

    pinned = (NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, rows))
    with jax.set_mesh(mesh):
        hlo = jax.jit(gradients, out_shardings=pinned).lower(*operands).compile().as_text()
    assert reduced_matrices(hlo, mesh)


@pytest.mark.parametrize(
    "line",
    [
        "  %all-reduce.7 = f32[112,80]{1,0} all-reduce(%dot.3), channel_id=1, replica_groups={{0,1}}, to_apply=%add",
        "  ROOT %r = (f32[3,80]{1,0}, bf16[2,56,80]{2,1,0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8]",
        "  %s = f32[80,28]{1,0} all-reduce-start(f32[80,28]{1,0} %d), replica_groups={{0,1}}, to_apply=%add",
        "  %c = f32[28,80]{1,0} reduce-scatter(f32[56,80]{1,0} %d), replica_groups={{0,1}}, dimensions={0}",
        "  %f = f32[8960]{0} all-reduce(%bitcast), replica_groups={{0,1}}, to_apply=%add",
        "  %k = f32[80,48]{0,1} all-reduce(%dot), replica_groups={{0,1}}, to_apply=%add",
    ],
)
def test_the_checker_reads_tuples_parts_and_every_dtype(line: str) -> None:
    assert reduced_matrices(line, make_mesh(MeshConfig(2, 2, 2)))


def test_the_checker_lets_adapters_and_activations_pass() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    lines = [
        f"  %a = f32[{shape}]{{1,0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%add"
        for shape in ("3,80", "112,3", "2,36,80", "2,36,4,12", "512,80", "80")
    ]
    lines.append("  %g = f32[112,80]{1,0} all-gather(f32[56,80]{1,0} %w), replica_groups={{0,1}}, dimensions={0}")
    assert not reduced_matrices("\n".join(lines), mesh)
    assert dataclasses.asdict(SPEC)["hidden_size"] == 80
