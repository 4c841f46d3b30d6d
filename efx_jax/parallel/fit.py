"""Does a model fit a mesh? Every division is checked before anything is loaded, and a mesh that fits is suggested."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from efx_jax.config import MeshConfig
from efx_jax.errors import InputError
from efx_jax.parallel.mesh import mesh_size, mesh_sizes
from efx_jax.parallel.partition import BATCH, VOCABULARY, axes_size, linear_axes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a mesh must divide.

    Attributes:
        linears: `[O,I]` of every linear by name.
        heads: N and K: query heads and key/value heads; () if a head may be split over several devices.
        vocabulary: V.
        micro_batch: sequences per forward pass over all devices.
        block: consecutive inputs that must stay on one device: 8 for a packed mask, M for an N:M pattern.
    """

    linears: Mapping[str, tuple[int, int]]
    heads: tuple[int, ...]
    vocabulary: int
    micro_batch: int
    block: int = 8


def check_mesh(mesh: MeshConfig, sizes: Sizes) -> None:
    """Refuses a mesh that does not divide the model or the batch, and suggests the nearest one that does.

    Raises:
        InputError: names the first division that leaves a remainder.
    """
    problem = next(misfits(mesh, sizes), None)
    if problem is None:
        return
    found = nearest_fit(mesh, sizes)
    shape = f"--mesh.data {found.data} --mesh.fsdp {found.fsdp} --mesh.tensor {found.tensor}"
    raise InputError(f"mesh: {problem}; a mesh that fits: {shape}")


def misfits(mesh: MeshConfig, sizes: Sizes) -> Iterator[str]:
    """Every division that leaves a remainder, as a clause."""
    along = mesh_sizes(mesh)
    yield from _rest("train.micro_batch (or batch_size)", sizes.micro_batch, BATCH, along)
    for what, count in zip(("num_attention_heads", "num_key_value_heads"), sizes.heads, strict=False):
        yield from _rest(what, count, ("tensor",), along)
    yield from _rest("vocab_size", sizes.vocabulary, VOCABULARY, along)
    for name, (out_dim, in_dim) in sizes.linears.items():
        axes = linear_axes(name)
        # If the inputs are split, the surgeons exchange them for whole rows.
        yield from _rest(f"the output width of {name}:", out_dim, (*axes.rows, *axes.columns), along)
        parts = axes_size(axes.columns, along)
        if parts > 1 and in_dim % (parts * sizes.block):
            yield f"the {in_dim} inputs of {name} do not divide into {parts} (tensor) parts of whole {sizes.block}s"


def _rest(what: str, count: int, axes: tuple[str, ...], along: Mapping[str, int]) -> Iterator[str]:
    parts = axes_size(axes, along)
    if count % parts:
        yield f"{what} {count} does not divide into {parts} ({' x '.join(axes)}) parts"


def nearest_fit(mesh: MeshConfig, sizes: Sizes) -> MeshConfig:
    """A mesh that fits: the most devices up to as many as requested, then the closest `tensor` and `fsdp`."""
    most = mesh_size(mesh)
    shapes = [
        (data, fsdp, tensor)
        for tensor in _divisors(sizes.heads[1], most)
        for fsdp in _divisors(sizes.micro_batch, most // tensor)
        for data in _divisors(sizes.micro_batch // fsdp, most // tensor // fsdp)
    ]
    shapes.sort(key=lambda shape: (-math.prod(shape), abs(shape[2] - mesh.tensor), abs(shape[1] - mesh.fsdp)))
    candidates = (dataclasses.replace(mesh, data=data, fsdp=fsdp, tensor=tensor) for data, fsdp, tensor in shapes)
    # One device always fits.
    return next(candidate for candidate in candidates if next(misfits(candidate, sizes), None) is None)


def _divisors(number: int, most: int) -> list[int]:
    return [part for part in range(1, min(number, most) + 1) if number % part == 0]
