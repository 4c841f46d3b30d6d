"""Writes what a run has changed in its base as a bundle, and tests that the bundle reproduces the export."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from efx_jax.errors import InputError
from efx_jax.files import atomic_folder
from efx_jax.lora import Adapters
from efx_jax.model.spec import LINEARS, ModelSpec, config_from_spec
from efx_jax.weights import byte_ranges
from efx_jax.weights.bitmask import COMPRESSED, SUFFIX, count_bits, unpack_bits
from efx_jax.weights.bundle import (
    ADAPTER,
    FORMAT,
    MANIFEST,
    MASKS,
    MOVED,
    OTHERS,
    VERSION,
    content_sha256,
    different_files,
    open_bundle,
    rebuild,
)
from efx_jax.weights.byte_ranges import whole
from efx_jax.weights.hf import INDEX, open_model
from efx_jax.weights.safetensors_file import lay_out, read_header
from efx_jax.weights.sealed import file_table, write_sealed
from efx_jax.weights.source import TensorSource, leaves
from efx_jax.weights.sparsity import FILE as SPARSITY
from efx_jax.weights.sparsity import Asked


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run has changed in its base.

    Attributes:
        base: the base, whatever `load_pretrained` accepts.
        dtype: dtype in which the run held the base, or None: the base's own.
        adapters: numpy arrays.
        masks: linear -> uint8 `[L,O,ceil(I/8)]`; {} without pruning.
        moved: linear -> `[L,O,I]` as the events have left it, read on demand; None: no linear was rewritten.
        asked: requested patterns and sparsity.
        export: the run's export.
    """

    base: str
    dtype: str | None
    adapters: Adapters
    masks: dict[str, np.ndarray]
    moved: Callable[[str], np.ndarray] | None
    asked: Asked
    export: Path


def write_bundle(outcome: Outcome, dst: str | os.PathLike[str]) -> dict[str, int]:
    """Writes a bundle, and temporarily rebuilds the export beside it to compare every file.

    Args:
        outcome: what the run has changed.
        dst: the folder to make.

    Returns:
        Bytes of every file of the bundle, and of the whole export under "export".

    Raises:
        InputError: the base is missing or not the run's, the export does not match the run's checkpoint, `dst` exists,
            or the disk is full.
    """
    source, spec = open_model(outcome.base)
    names = [path.relative_to(outcome.export).as_posix() for path in outcome.export.rglob("*") if path.is_file()]
    export = file_table(outcome.export, names)
    with atomic_folder(dst) as partial:
        _write_arrays(partial, outcome, source, spec)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "base": {
                "path": outcome.base,
                "sha256": content_sha256(source, spec),
                "config": config_from_spec(spec, "float32"),
            },
            "dtype": outcome.dtype,
            "scale": outcome.adapters.scale,
            "patterns": dict(outcome.asked.patterns),
            "sparsity": outcome.asked.sparsity,
            "transformers": _version("transformers"),
            "others": [],
            "files": file_table(partial, [path.name for path in partial.iterdir()]),
            "export": export,
        }
        write_sealed(partial / MANIFEST, manifest)
        manifest["others"] = _others(partial, outcome, source, spec, export)
        for name in manifest["others"]:
            (partial / OTHERS / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(outcome.export / name, partial / OTHERS / name)
        manifest["files"] |= file_table(partial, [f"{OTHERS}/{name}" for name in manifest["others"]])
        write_sealed(partial / MANIFEST, manifest)
        sizes = {name: fields["bytes"] for name, fields in manifest["files"].items()}
        sizes[MANIFEST] = (partial / MANIFEST).stat().st_size
    return sizes | {"export": sum(fields["bytes"] for fields in export.values())}


def sizes_text(sizes: Mapping[str, int]) -> str:
    """The sizes that `write_bundle` returns, one per line, in MB (a million bytes)."""
    export = sizes["export"]
    total = sum(size for name, size in sizes.items() if name != "export")
    lines = [(name, size) for name, size in sizes.items() if name != "export"]
    lines += [("the bundle", total), ("the dense export", export)]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {size / 1e6:10.3f} MB  {size / export:7.2%}" for name, size in lines)


def _write_arrays(folder: Path, outcome: Outcome, source: TensorSource, spec: ModelSpec) -> None:
    """Writes adapters and, if there are any, masks and moved weights."""
    adapters = outcome.adapters
    arrays = {
        f"{kind}.{name}": np.ascontiguousarray(array, np.float32)
        for kind, group in (("lora_a", adapters.lora_a), ("lora_b", adapters.lora_b))
        for name, array in group.items()
    }
    # Not `save_file`, whose files only their owner may read.
    (folder / ADAPTER).write_bytes(save(arrays, metadata={"format": FORMAT}))
    if outcome.masks:
        masks = {name: np.ascontiguousarray(mask) for name, mask in outcome.masks.items()}
        (folder / MASKS).write_bytes(save(masks, metadata={"format": FORMAT}))
    if outcome.moved is not None:
        _write_moved(folder / MOVED, outcome.moved, outcome.masks, spec)


def _write_moved(
    path: Path, moved: Callable[[str], np.ndarray], masks: Mapping[str, np.ndarray], spec: ModelSpec
) -> None:
    """Writes the kept entries of every linear, with one stacked matrix in memory at a time."""
    shapes: dict[str, tuple[int, ...]] = {}
    linears = [leaf for leaf in leaves(spec) if leaf.path[-1] in LINEARS]
    for leaf in linears:
        mask = masks.get(leaf.path[-1])
        for layer, name in enumerate(leaf.names):
            kept = None if mask is None else int(count_bits(mask[layer]).sum())
            shapes |= {name: leaf.tensor_shape} if kept is None else {name.removesuffix(SUFFIX) + COMPRESSED: (kept,)}
    dtype = str(moved(linears[0].path[-1]).dtype)
    lay_out(path, shapes, dict.fromkeys(shapes, dtype), {"format": FORMAT})
    places = read_header(path)
    with open(path, "r+b") as file:
        for leaf in linears:
            stacked, mask = moved(leaf.path[-1]), masks.get(leaf.path[-1])
            for layer, name in enumerate(leaf.names):
                values = stacked[layer]
                if mask is not None:
                    name = name.removesuffix(SUFFIX) + COMPRESSED
                    values = values[unpack_bits(mask[layer], values.shape[1])]
                place = places[name]
                values = np.ascontiguousarray(values)
                byte_ranges.write_part(file.fileno(), place.start, values, place.shape, whole(place.shape))


def _others(
    folder: Path, outcome: Outcome, source: TensorSource, spec: ModelSpec, export: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Names of the files of the export that the base does not reproduce.

    Raises:
        InputError: weights, `config.json` or `efx_sparsity.json` are among them.
    """
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        rebuild(open_bundle(folder), source, spec, outcome.base, Path(place) / "export", check=False)
        differing = different_files(Path(place) / "export", export)
    made = [n for n in differing if n.endswith(".safetensors") or n in (INDEX, "config.json", SPARSITY)]
    if made:
        raise InputError(
            f"{outcome.export / made[0]}: is not what the run's checkpoint and {outcome.base} give; an earlier version "
            "wrote it, or another base lies there now; remove export/ and summary.json and give the run's command again"
        )
    return differing


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
