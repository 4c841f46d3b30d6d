"""Describes what a checkpoint holds, and compares two checkpoints, whatever their formats."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efx_jax.model.spec import ModelSpec
from efx_jax.weights.bitmask import packed_bytes
from efx_jax.weights.byte_ranges import row_blocks, whole
from efx_jax.weights.hf import open_model
from efx_jax.weights.safetensors_file import tensor_bytes
from efx_jax.weights.source import DTYPES, TensorSource, leaves
from efx_jax.weights.sparsity import found_pattern, inspect_zeros

# Bits per entry: four, and a 16-bit scale for every 32 entries, as in GGUF's Q4_0.
_FOUR_BITS = 4.5


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far apart two tensors of the same name are.

    Attributes:
        absolute: largest |a - b|.
        relative: largest |a - b| / max(|a|, |b|), 0 where both are 0.
    """

    absolute: float
    relative: float


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Bytes of some tensors as they are, packed by `weights.packed`, and quantised to about four bits."""

    dense: int
    packed: int
    four_bit: int

    def plus(self, other: "_Sizes") -> "_Sizes":
        return _Sizes(self.dense + other.dense, self.packed + other.packed, self.four_bit + other.four_bit)


def inspect(path: str | os.PathLike[str]) -> str:
    """Describes a checkpoint as a text table.

    Args:
        path: whatever `load_pretrained` accepts.

    Returns:
        Model type, number of parameters, dtypes, sizes, and how many entries are not finite, if any; then one line per
        kind of tensor with its shape, dtype, number of entries, share of exact zeros and, for matrices of the layers,
        their pattern.

    Raises:
        InputError: the checkpoint is missing, damaged or unsupported.
    """
    source, spec = open_model(path)
    rows = [("tensor", "layers", "shape", "dtype", "entries", "zeros", "pattern")]
    total = linear_total = linear_zeros = not_finite = 0
    sizes = _Sizes(0, 0, 0)
    for leaf in leaves(spec):
        is_linear = leaf.stacked and len(leaf.tensor_shape) == 2
        found = {name: inspect_zeros(source, name) for name in leaf.names}
        entries, zeros = math.prod(leaf.shape), sum(tensor.zeros for tensor in found.values())
        total += entries
        not_finite += sum(tensor.not_finite for tensor in found.values())
        if is_linear:
            linear_total, linear_zeros = linear_total + entries, linear_zeros + zeros
        for name, tensor in found.items():
            sizes = sizes.plus(_sizes(source, name, tensor.stored if is_linear else None))
        shape = " x ".join(str(length) for length in leaf.tensor_shape)
        layers = str(len(leaf.names)) if leaf.stacked else ""
        pattern = found_pattern(found.values()) if is_linear else ""
        dtypes = _dtypes(source, leaf.names)
        rows.append((leaf.path[-1], layers, shape, dtypes, f"{entries:,}", f"{zeros / entries:.4%}", pattern))
    head = [
        f"path        {source.path}",
        f"model_type  {spec.model_type}, {spec.num_layers} layers{', tied head' if spec.tie_word_embeddings else ''}",
        f"parameters  {total:,}",
        f"dtype       {_dtypes(source, [name for leaf in leaves(spec) for name in leaf.names])}",
        f"sparsity    {linear_zeros / linear_total:.4%} of the {linear_total:,} entries of the layers' matrices",
        *([f"not finite  {not_finite:,} entries are NaN or infinite"] if not_finite else []),
        f"on disk     {_bytes_on_disk(source.path):,} bytes",
        f"dense       {sizes.dense:,} bytes of weights",
        f"packed      {sizes.packed:,} bytes, {sizes.packed / sizes.dense:.2%} of dense",
        f"4-bit       {sizes.four_bit:,} bytes, for scale: the layers' matrices quantised to {_FOUR_BITS:g} bits each",
        "",
    ]
    return "\n".join(head + _aligned(rows))


def verify(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> tuple[str, int]:
    """Compares two checkpoints tensor by tensor.

    Args:
        a: whatever `load_pretrained` accepts.
        b: the same, in any other format.

    Returns:
        A report, and 0 if both are the same model, including the ids of its special tokens, with equal numbers in every
        tensor (whatever the dtype), else 1.

    Raises:
        InputError: a checkpoint is missing, damaged or unsupported.
    """
    (source_a, spec_a), (source_b, spec_b) = open_model(a), open_model(b)
    lines = [f"config: {line}" for line in _other_fields(spec_a, spec_b)]
    if leaves(spec_a) != leaves(spec_b):
        return "\n".join(["different models", *lines]), 1
    names = [name for leaf in leaves(spec_a) for name in leaf.names]
    differences = {name: difference for name in names if (difference := _difference(source_a, source_b, name))}
    for name, difference in differences.items():
        lines.append(f"{name}: absolute {difference.absolute:.6g}, relative {difference.relative:.6g}")
    if differences:
        absolute = max(difference.absolute for difference in differences.values())
        relative = max(difference.relative for difference in differences.values())
        lines.append(
            f"{len(differences)} of {len(names)} tensors differ: largest absolute difference {absolute:.6g}, "
            f"largest relative difference {relative:.6g}"
        )
        return "\n".join(lines), 1
    same_dtypes = all(source_a.dtypes[name] == source_b.dtypes[name] for name in names)
    equal = f"all {len(names)} tensors are identical" + ("" if same_dtypes else " in value; their dtypes differ")
    return "\n".join([*lines, equal]), int(bool(lines))


def _other_fields(a: ModelSpec, b: ModelSpec) -> list[str]:
    pairs = {field.name: (getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)}
    return [f"{name} {x} against {y}" for name, (x, y) in pairs.items() if x != y]


def _difference(a: TensorSource, b: TensorSource, name: str) -> Difference | None:
    """How far apart two tensors are, a block of rows in float64 at a time; None if they are equal."""
    shape = a.shapes[name]
    found = []
    for block in row_blocks(whole(shape), math.prod(shape[1:]) * np.dtype(np.float64).itemsize):
        x, y = a.read_part(name, block), b.read_part(name, block)
        if np.array_equal(x, y, equal_nan=True):
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        apart, size = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
        found.append((apart.max(), (apart / np.where(size > 0, size, 1)).max()))
    # Not Python's max, which may drop a NaN.
    return Difference(*map(float, np.max(found, axis=0))) if found else None


def _sizes(source: TensorSource, name: str, stored: int | None) -> "_Sizes":
    """Bytes of a tensor; `stored`: number of entries with a bit set if it is a matrix that can be packed, else None."""
    dense = tensor_bytes(source, name)
    if stored is None:
        return _Sizes(dense, dense, dense)
    out_dim, in_dim = source.shapes[name]
    packed = packed_bytes(out_dim, in_dim, stored, DTYPES[source.dtypes[name]].itemsize)
    return _Sizes(dense, min(dense, packed), math.ceil(out_dim * in_dim * _FOUR_BITS / 8))


def _dtypes(source: TensorSource, names: Sequence[str]) -> str:
    return "+".join(sorted({source.dtypes[name] for name in names}))


def _bytes_on_disk(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    # Words to the left, numbers to the right.
    left = (0, 2, 3, 6)
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
