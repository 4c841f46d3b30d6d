"""Counts the zeros in files, finds their pattern, and checks an export against what was requested.

`efx_sparsity.json` is only a description. No loader acts on it, unlike a `sparsity_config` in `config.json`.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efx_jax.config_event import n_of_m
from efx_jax.errors import InputError
from efx_jax.files import atomic_write
from efx_jax.masks import count_kept
from efx_jax.model.spec import ModelSpec
from efx_jax.weights.bitmask import bits_of
from efx_jax.weights.byte_ranges import row_blocks, whole
from efx_jax.weights.safetensors_file import change_metadata, read_header, tensor_bytes
from efx_jax.weights.source import TensorSource, leaves

FILE = "efx_sparsity.json"
DENSE, UNSTRUCTURED = "dense", "unstructured"
_FORMAT, _VERSION = "efx-sparsity", 1
_GROUPS = (2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the linears of an export must look like.

    Attributes:
        patterns: pruned linear (`q_proj`, ...) -> "unstructured" or "N:M": N of M consecutive inputs are kept.
        sparsity: requested share of zeros.
        pruned: Hugging Face name -> number of entries that its mask prunes, if known.
    """

    patterns: Mapping[str, str]
    sparsity: float
    pruned: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Zeros:
    """The zeros of one tensor.

    Attributes:
        entries: number of entries of the tensor.
        zeros: how many are 0.0 or -0.0.
        stored: how many have any bit set, so that `weights.bitmask` stores them.
        not_finite: how many are infinite or NaN.
        mask_sha256: SHA-256 of its `P.bitmask` there.
        fullest: M -> the most nonzero entries among M consecutive inputs, for each requested M that divides the rows.
    """

    entries: int
    zeros: int
    stored: int
    not_finite: int
    mask_sha256: str
    fullest: Mapping[int, int]


def count_zeros(source: TensorSource, name: str, groups: Iterable[int] = ()) -> Zeros:
    """Counts the zeros of one tensor, including -0.0, a block of rows at a time.

    Args:
        source: the checkpoint.
        name: the tensor's name.
        groups: which M to look at.

    Raises:
        InputError: it cannot be read.
    """
    shape = source.shapes[name]
    fullest = {size: 0 for size in groups if len(shape) == 2 and shape[1] % size == 0}
    entries, zeros, stored, not_finite, digest = math.prod(shape), 0, 0, 0, hashlib.sha256()
    for block in row_blocks(whole(shape), tensor_bytes(source, name) // shape[0]):
        values = source.read_part(name, block)
        stays, bits = values != 0, bits_of(values) != 0
        zeros += stays.size - int(np.count_nonzero(stays))
        stored += int(np.count_nonzero(bits))
        not_finite += values.size - int(np.count_nonzero(np.isfinite(values)))
        digest.update(np.packbits(bits, axis=-1, bitorder="little").data)
        for size, most in fullest.items():
            # Once some group is full, there is nothing more to learn.
            if most < size:
                fullest[size] = max(most, int(np.count_nonzero(stays.reshape(-1, size), axis=1).max()))
    return Zeros(entries, zeros, stored, not_finite, digest.hexdigest(), fullest)


def found_pattern(zeros: Iterable[Zeros]) -> str:
    """The joint pattern of some matrices: "dense" if there is no zero; the N:M with the smallest M that all obey, if
    99 % of the places it allows are filled; else "unstructured"."""
    tensors = list(zeros)
    entries, count = sum(z.entries for z in tensors), sum(z.zeros for z in tensors)
    if count == 0:
        return DENSE
    for size in _GROUPS:
        kept = max(z.fullest.get(size, size) for z in tensors)
        if 0 < kept < size and entries - count >= 0.99 * entries * kept / size:
            return f"{kept}:{size}"
    return UNSTRUCTURED


def inspect_zeros(source: TensorSource, name: str) -> Zeros:
    """`count_zeros` with every M that `found_pattern` knows, provided that it is narrower than a row."""
    return count_zeros(source, name, [size for size in _GROUPS if size < source.shapes[name][-1]])


def pattern_of(group: str) -> str:
    """The pattern of a matrix that was pruned within `prune.group`: "N:M", or "unstructured"."""
    return group if n_of_m(group) else UNSTRUCTURED


def pruned_entries(masks: Mapping[str, Any], spec: ModelSpec) -> dict[str, int]:
    """Hugging Face name -> how many of the tensor's entries the masks (`[L,O,I]`, bool or packed) prune."""
    pruned: dict[str, int] = {}
    for leaf in leaves(spec):
        mask = masks.get(leaf.path[-1])
        if leaf.stacked and mask is not None:
            kept = np.asarray(count_kept(mask))
            pruned |= {name: math.prod(leaf.tensor_shape) - int(kept[i]) for i, name in enumerate(leaf.names)}
    return pruned


def metadata_before(spec: ModelSpec, asked: Asked) -> dict[str, str]:
    """Placeholders for `write_audit`'s metadata until the tensors are written: as long, but with other digits."""
    return {name: _value(_pattern(leaf, asked), 0.0) for leaf, name in _names(spec)}


def write_audit(folder: Path, source: TensorSource, spec: ModelSpec, asked: Asked) -> dict[str, Any]:
    """Counts the zeros of every tensor of an export from its files, and writes what it finds.

    `efx_sparsity.json` gets all of it; the metadata of the safetensors files get the pattern and the share of zeros of
    every tensor under its name. The files must have been made with `metadata_before`.

    Args:
        folder: a Hugging Face folder.
        source: the same folder, opened.
        spec: its model.
        asked: what it must look like.

    Returns:
        The content of `efx_sparsity.json`.

    Raises:
        InputError: a group of M inputs keeps more than N, or fewer entries are zero than were pruned.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for leaf, name in _names(spec):
        pattern = _pattern(leaf, asked)
        limits = n_of_m(pattern)
        found = count_zeros(source, name, (limits[1],) if limits else ())
        _check(name, pattern, found, asked)
        tensors[name] = {
            "pattern": pattern,
            "shape": list(source.shapes[name]),
            "zeros": found.zeros,
            "sparsity": found.zeros / found.entries,
            **({} if pattern == DENSE else {"mask_sha256": found.mask_sha256}),
        }
    for file in sorted(folder.glob("*.safetensors")):
        here = [name for name in read_header(file) if name in tensors]
        change_metadata(file, {name: _value(tensors[name]["pattern"], tensors[name]["sparsity"]) for name in here})
    report = _totals(tensors, spec, asked) | {"tensors": tensors}
    atomic_write(folder / FILE, json.dumps(report, indent=1) + "\n")
    return report


def _check(name: str, pattern: str, found: Zeros, asked: Asked) -> None:
    limits = n_of_m(pattern)
    if limits and found.fullest.get(limits[1], limits[1]) > limits[0]:
        raise InputError(
            f"export: {name} keeps {found.fullest.get(limits[1], limits[1])} of {limits[1]} consecutive inputs "
            f"somewhere, expected at most {limits[0]} (pattern {pattern}); its masks do not fit prune.group"
        )
    if found.zeros < asked.pruned.get(name, 0):
        raise InputError(
            f"export: {name} has {found.zeros:,} zeros, expected the {asked.pruned[name]:,} that its mask prunes; "
            "nothing was written"
        )


def _totals(tensors: Mapping[str, Mapping[str, Any]], spec: ModelSpec, asked: Asked) -> dict[str, Any]:
    linears = [name for leaf in leaves(spec) if len(leaf.shape) == 3 for name in leaf.names]
    entries = sum(math.prod(tensors[name]["shape"]) for name in linears)
    zeros = sum(tensors[name]["zeros"] for name in linears)
    patterns = sorted(set(asked.patterns.values())) or [DENSE]
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "pattern": patterns[0] if len(patterns) == 1 else patterns,
        "sparsity_asked": asked.sparsity,
        "linears": {"entries": entries, "zeros": zeros, "sparsity": zeros / entries},
    }


def _names(spec: ModelSpec) -> Iterable[tuple[str, str]]:
    """Leaf's name and Hugging Face name of every tensor."""
    return [(leaf.path[-1], name) for leaf in leaves(spec) for name in leaf.names]


def _pattern(leaf: str, asked: Asked) -> str:
    return asked.patterns.get(leaf, DENSE)


def _value(pattern: str, share: float) -> str:
    return f"{pattern} {share:.6f}"
