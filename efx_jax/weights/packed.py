"""Packs a dense Hugging Face folder, and unpacks it to the same dense folder, file by file and bit for bit."""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efx_jax.errors import InputError
from efx_jax.files import atomic_folder, sha256_of
from efx_jax.model.spec import spec_from_config
from efx_jax.weights import byte_ranges
from efx_jax.weights.bitmask import (
    BITMASK,
    COMPRESSED,
    ROW_OFFSETS,
    SHAPE,
    SUFFIX,
    bits_of,
    count_bits,
    pack_rows,
    packed_bytes,
)
from efx_jax.weights.byte_ranges import Part, whole
from efx_jax.weights.fetch import local_path
from efx_jax.weights.hf import INDEX, folder_files, open_folder
from efx_jax.weights.orbax import is_orbax_folder
from efx_jax.weights.packed_file import (
    FORMAT,
    MANIFEST,
    VERSION,
    block_check,
    block_rows,
    is_packed_folder,
    open_packed,
    read_manifest,
    stored_tensors,
)
from efx_jax.weights.safetensors_file import (
    STORED,
    Entry,
    array_bytes,
    lay_out,
    read_header,
    read_header_text,
    read_part,
)
from efx_jax.weights.sealed import check_files, file_table, is_inner_name, write_sealed
from efx_jax.weights.source import check_names_and_shapes, check_tied_head, leaves

# Weights in other formats, pickles and code: none of these go into a packed folder.
_WEIGHTS = (".safetensors", ".bitmask", ".gguf", ".h5", ".msgpack", ".onnx")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh")


@dataclasses.dataclass(frozen=True)
class Packing:
    """What `pack` has done.

    Attributes:
        dense_bytes: bytes of the safetensors files.
        packed_bytes: bytes of the files that replaced them.
        left_out: files that were not carried over: pickles, code, weights in other formats, hidden files,
            names with a backslash.
    """

    dense_bytes: int
    packed_bytes: int
    left_out: tuple[str, ...]

    def text(self, dst: str | os.PathLike[str]) -> str:
        """The lines that the command prints."""
        share = self.packed_bytes / self.dense_bytes
        lines = [f"wrote {dst}: {self.dense_bytes:,} bytes of weights became {self.packed_bytes:,} ({share:.2%})"]
        return "\n".join([*lines, *(f"left out {name}" for name in self.left_out)])


def pack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> Packing:
    """Writes a packed folder, with one block of rows in memory at a time.

    The matrices of the layers are packed if that makes them smaller; embeddings, head, norms, biases and matrices
    with hardly any zeros stay as they are. Every other file is copied, except those of `Packing.left_out`.

    Args:
        src: a Hugging Face folder with safetensors, a run (its export) or a Hub name.
        dst: the folder to make.

    Raises:
        InputError: `src` is not such a folder or is damaged, `dst` exists, or the disk is full.
    """
    folder = local_path(src)
    if folder.is_file() or is_orbax_folder(folder) or is_packed_folder(folder):
        raise InputError(
            f"{folder}: is not a dense Hugging Face folder; expected one with safetensors; make one with "
            "convert_weights.py export"
        )
    source = open_folder(folder)
    spec = spec_from_config(source.config)
    check_names_and_shapes(source, spec)
    check_tied_head(source, spec)
    linears = {name for leaf in leaves(spec) if leaf.stacked and len(leaf.shape) == 3 for name in leaf.names}
    files = folder_files(folder)
    inner = next((file for file in files if file.parent != folder), None)
    if inner is not None:
        raise InputError(f"{inner}: expected the shards in {folder} itself; convert_weights.py export puts them there")
    kept = {
        name: count
        for entries in files.values()
        for name, entry in entries.items()
        if name in linears and (count := _worth_packing(name, entry)) is not None
    }
    layouts = {file: _layout(entries, kept) for file, entries in files.items()}
    needs = sum(array_bytes(*array) for layout in layouts.values() for array in layout.values())
    carried, left_out = _other_files(folder, {file.name for file in files})
    with atomic_folder(dst, needs=needs) as partial:
        manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "files": {}, "tensors": {}}
        for file, entries in files.items():
            packed = partial / f"{file.stem}.bitmask"
            manifest["tensors"] |= _pack_file(entries, layouts[file], packed)
            manifest["files"][file.name] = {
                "packed": packed.name,
                "bytes": file.stat().st_size,
                "sha256": sha256_of(file),
                "header": read_header_text(file).decode(),
            }
        for name in carried:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        index = folder / INDEX
        manifest["index"] = index.read_bytes().decode() if index.is_file() else None
        manifest["others"] = file_table(partial, carried)
        write_sealed(partial / MANIFEST, manifest)
        sizes = [fields["bytes"] for fields in manifest["files"].values()]
        written = [(partial / fields["packed"]).stat().st_size for fields in manifest["files"].values()]
    return Packing(sum(sizes), sum(written), tuple(left_out))


def unpack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Restores the dense folder that `pack` was given, the same bytes in every file.

    Args:
        src: a packed folder.
        dst: the folder to make.

    Raises:
        InputError: `src` is not a packed folder or is damaged where it matters, `dst` exists, or the disk is full.
    """
    folder = Path(src)
    if not is_packed_folder(folder):
        raise InputError(f"{folder}: is not a packed folder; expected one of convert_weights.py pack, with {MANIFEST}")
    manifest = read_manifest(folder)
    check_files(folder, manifest["others"])
    source, stored = open_packed(folder), stored_tensors(folder, manifest)
    with atomic_folder(dst, needs=sum(fields["bytes"] for fields in manifest["files"].values())) as partial:
        for dense_name, fields in manifest["files"].items():
            header = fields["header"].encode()
            with open(partial / dense_name, "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.truncate(fields["bytes"])
                file.flush()
                for name, tensor in stored.items():
                    if tensor.dense.path.name == dense_name:
                        for block in _blocks(tensor.dense):
                            values = source.read_part(name, block)
                            entry = tensor.dense
                            byte_ranges.write_part(file.fileno(), entry.start, values, entry.shape, block)
            if sha256_of(partial / dense_name) != fields["sha256"]:
                raise InputError(f"{folder / fields['packed']}: does not give {dense_name} back; copy the folder again")
        for name in manifest["others"]:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        if manifest["index"] is not None:
            (partial / INDEX).write_bytes(manifest["index"].encode())


def _worth_packing(name: str, entry: Entry) -> int | None:
    """How many entries of a matrix have a bit set; None if packing it saves nothing."""
    entries = sum(int(np.count_nonzero(bits_of(read_part(entry, name, block)))) for block in _blocks(entry))
    out_dim, in_dim = entry.shape
    itemsize = STORED[entry.dtype].itemsize
    return entries if packed_bytes(out_dim, in_dim, entries, itemsize) < out_dim * in_dim * itemsize else None


def _blocks(entry: Entry) -> Iterator[Part]:
    """The blocks of a tensor, each with its own checksum."""
    rows = block_rows(entry.shape, entry.dtype)
    return byte_ranges.row_blocks(whole(entry.shape), 1, rows)


_Layout = dict[str, tuple[tuple[int, ...], str]]


def _layout(entries: Mapping[str, Entry], kept: Mapping[str, int]) -> _Layout:
    """Name -> shape and dtype of every array of a packed file; `kept`: matrix to pack -> number of its entries."""
    layout: _Layout = {}
    for name, entry in entries.items():
        if name not in kept:
            layout[name] = (entry.shape, entry.dtype)
            continue
        stem, (rows, columns) = name.removesuffix(SUFFIX), entry.shape
        layout[stem + COMPRESSED] = ((kept[name],), entry.dtype)
        layout[stem + BITMASK] = ((rows, -(-columns // 8)), "uint8")
        layout[stem + SHAPE] = ((2,), "int64")
        layout[stem + ROW_OFFSETS] = ((rows,), "int64")
    return layout


def _pack_file(entries: Mapping[str, Entry], layout: _Layout, path: Path) -> dict[str, dict[str, Any]]:
    """Writes one packed file; returns the rows per block and the checksums of every tensor."""
    shapes = {name: shape for name, (shape, _) in layout.items()}
    lay_out(path, shapes, {name: dtype for name, (_, dtype) in layout.items()}, {"format": FORMAT})
    places = read_header(path, integers=True)
    checks: dict[str, dict[str, Any]] = {}
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for name, entry in entries.items():
            write = _write_dense if name in places else _write_packed
            found = write(descriptor, name, entry, places)
            checks[name] = {"rows": block_rows(entry.shape, entry.dtype), "crc32": found}
    finally:
        os.close(descriptor)
    return checks


def _write_dense(descriptor: int, name: str, entry: Entry, places: Mapping[str, Entry]) -> list[int]:
    """Copies a tensor; returns the checksums of its blocks."""
    checks = []
    for block in _blocks(entry):
        values = read_part(entry, name, block)
        _write(descriptor, places[name], values, block)
        checks.append(block_check({"": values}))
    return checks


def _write_packed(descriptor: int, name: str, entry: Entry, places: Mapping[str, Entry]) -> list[int]:
    """Writes the four arrays of a matrix; returns the checksums of its blocks."""
    stem, done, checks = name.removesuffix(SUFFIX), 0, []
    for block in _blocks(entry):
        bitmask, compressed = pack_rows(read_part(entry, name, block))
        counts = count_bits(bitmask)
        offsets = done + np.cumsum(counts) - counts
        _write(descriptor, places[stem + ROW_OFFSETS], offsets, block[:1])
        _write(descriptor, places[stem + BITMASK], bitmask, (block[0], slice(0, bitmask.shape[1])))
        _write(descriptor, places[stem + COMPRESSED], compressed, (slice(done, done + compressed.size),))
        checks.append(block_check({ROW_OFFSETS: offsets, BITMASK: bitmask, COMPRESSED: compressed}))
        done += compressed.size
    _write(descriptor, places[stem + SHAPE], np.array(entry.shape, np.int64), (slice(0, 2),))
    return checks


def _write(descriptor: int, place: Entry, values: np.ndarray, part: Part) -> None:
    byte_ranges.write_part(descriptor, place.start, values, place.shape, part)


def _other_files(folder: Path, weights: set[str]) -> tuple[list[str], list[str]]:
    """Names of the files beside the weights: those to carry over, and those to leave out."""
    carried: list[str] = []
    left_out: list[str] = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name in weights or name == INDEX:
            continue
        # `unpack` refuses a name that would lead out of its folder on another system.
        hidden = not is_inner_name(name) or any(part.startswith(".") for part in name.split("/"))
        (left_out if hidden or file.suffix.lower() in (*_WEIGHTS, *_PICKLES, *_CODE) else carried).append(name)
    return carried, left_out
