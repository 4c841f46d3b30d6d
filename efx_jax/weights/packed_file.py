"""A packed folder, opened like any other checkpoint: rows are expanded as they are read, and checked.

```
FOLDER/packed.json       what is needed to restore the dense folder bit for bit, and a checksum of every block of rows
FOLDER/NAME.bitmask      the tensors of NAME.safetensors, as safetensors: matrices of the layers as in `weights.bitmask`
                         where that is smaller, every other tensor unchanged
FOLDER/config.json ...   the other files, unchanged
```

No other loader mistakes the folder for a dense checkpoint: it holds neither `.safetensors` files nor an index of them.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efx_jax.errors import InputError
from efx_jax.weights.bitmask import BITMASK, COMPRESSED, ROW_OFFSETS, SHAPE, SUFFIX, count_bits, expand_rows
from efx_jax.weights.byte_ranges import Part, part_shape
from efx_jax.weights.config_json import check_tokenizer_fits, read_json
from efx_jax.weights.safetensors_file import STORED, Entry, array_bytes, parse_header, read_header, read_part
from efx_jax.weights.sealed import FILE_TABLE, check_layout, check_names, read_sealed
from efx_jax.weights.source import TensorSource

MANIFEST = "packed.json"
FORMAT, VERSION = "efx-packed", 1
# Size of the rows that are checked together; small, so that reading a part reads little more than that part.
BLOCK_BYTES = 1 << 22
_LAYOUT = {
    "files": {"*": {"packed": str, "bytes": int, "sha256": str, "header": str}},
    "tensors": {"*": {"rows": int, "crc32": [int]}},
    "index": (str, type(None)),
    "others": FILE_TABLE,
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a packed folder.

    Attributes:
        dense: its shape and dtype, and its place in the dense file.
        pieces: suffix -> one of the arrays that represent it; only the key "": the tensor itself.
        checks: CRC-32 of every block of `rows` rows.
        rows: rows per block.
    """

    dense: Entry
    pieces: dict[str, Entry]
    checks: tuple[int, ...]
    rows: int


def is_packed_folder(path: Path) -> bool:
    """Whether a folder was made by `weights.packed.pack`."""
    return (path / MANIFEST).is_file()


def open_packed(folder: Path) -> TensorSource:
    """Opens a packed folder; reads no tensor.

    Reading a part reads, checks and expands the blocks of rows that it lies in; for a part of the columns, too, it
    reads whole rows.

    Raises:
        InputError: a file is missing, damaged or of another version; on reading, a block is damaged.
    """
    config = read_json(folder / "config.json")
    manifest = read_manifest(folder)
    stored = stored_tensors(folder, manifest)
    check_tokenizer_fits(folder, config)

    def read(name: str, part: Part) -> np.ndarray:
        return _read_part(stored[name], name, part)

    shapes = {name: tensor.dense.shape for name, tensor in stored.items()}
    dtypes = {name: tensor.dense.dtype for name, tensor in stored.items()}
    return TensorSource(folder, config, shapes, dtypes, read)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads `packed.json` and checks that it is intact and of a known version.

    Raises:
        InputError: it is not, a field is missing or of the wrong type, or it names files outside its folder.
    """
    manifest = read_sealed(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')} {manifest.get('version')}"
        raise InputError(f"{folder / MANIFEST}: expected {FORMAT} {VERSION}, found {found}; update efx_jax")
    check_layout(folder / MANIFEST, manifest, _LAYOUT)
    packed = [fields["packed"] for fields in manifest["files"].values()]
    check_names(folder / MANIFEST, [*manifest["files"], *packed, *manifest["others"]])
    return manifest


def stored_tensors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor of a packed folder, file by file in the order of the dense headers.

    Raises:
        InputError: a file is missing or damaged, or the arrays in it are not those of the manifest.
    """
    tensors: dict[str, Stored] = {}
    for dense_name, fields in manifest["files"].items():
        path = folder / fields["packed"]
        if not path.is_file():
            raise InputError(f"{path}: is missing, though {MANIFEST} lists it; copy the folder again")
        entries = read_header(path, integers=True)
        header = fields["header"].encode()
        dense_entries = parse_header(header, folder / dense_name)
        ends = [dense.start + array_bytes(dense.shape, dense.dtype) for dense in dense_entries.values()]
        if fields["bytes"] != max(ends, default=8 + len(header)):
            raise InputError(
                f"{folder / MANIFEST}: {dense_name} has not the size of its tensors; copy the folder again"
            )
        for name, dense in dense_entries.items():
            checks = manifest["tensors"].get(name)
            if not checks or not checks["rows"]:
                raise InputError(f"{folder / MANIFEST}: tensor {name} has no checksums; copy the folder again")
            pieces = _pieces(name, dense, entries, path)
            tensors[name] = Stored(dense, pieces, tuple(checks["crc32"]), checks["rows"])
    return tensors


def block_check(pieces: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of the arrays of one block, given by suffix (for a packed one: offsets, bitmask and entries)."""
    check = 0
    for _, values in sorted(pieces.items()):
        check = zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data, check)
    return check


def block_rows(shape: tuple[int, ...], dtype: str) -> int:
    """Rows per block of a tensor: about `BLOCK_BYTES`, and at least one row."""
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * STORED[dtype].itemsize
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def _pieces(name: str, dense: Entry, entries: Mapping[str, Entry], path: Path) -> dict[str, Entry]:
    """The arrays that represent a tensor, after checking their shapes and dtypes."""
    found = entries.get(name)
    if found is not None:
        _check_piece(found, dense.shape, dense.dtype, name)
        return {"": found}
    stem = name.removesuffix(SUFFIX)
    missing = [suffix for suffix in (COMPRESSED, BITMASK, SHAPE, ROW_OFFSETS) if stem + suffix not in entries]
    if missing or len(dense.shape) != 2:
        raise InputError(f"{path}: {stem}{''.join(missing[:1])} is missing; copy the folder again")
    pieces = {suffix: entries[stem + suffix] for suffix in (COMPRESSED, BITMASK, SHAPE, ROW_OFFSETS)}
    rows, columns = dense.shape
    _check_piece(pieces[BITMASK], (rows, -(-columns // 8)), "uint8", stem + BITMASK)
    _check_piece(pieces[ROW_OFFSETS], (rows,), "int64", stem + ROW_OFFSETS)
    _check_piece(pieces[SHAPE], (2,), "int64", stem + SHAPE)
    _check_piece(pieces[COMPRESSED], pieces[COMPRESSED].shape[:1], dense.dtype, stem + COMPRESSED)
    shape = read_part(pieces[SHAPE], stem + SHAPE, (slice(0, 2),))
    if tuple(shape.tolist()) != dense.shape:
        raise InputError(f"{path}: {stem}{SHAPE} says {shape.tolist()}, expected {list(dense.shape)}; copy it again")
    return pieces


def _check_piece(entry: Entry, shape: tuple[int, ...], dtype: str, name: str) -> None:
    if entry.shape != shape or entry.dtype != dtype:
        raise InputError(
            f"{entry.path}: {name} is {entry.dtype} {list(entry.shape)}, expected {dtype} {list(shape)}; "
            "copy the folder again"
        )


def _read_part(tensor: Stored, name: str, part: Part) -> np.ndarray:
    """One part of a tensor, from the blocks of rows that it lies in."""
    rows, step = part[0], tensor.rows
    out = np.empty(part_shape(part), STORED[tensor.dense.dtype])
    for number in range(rows.start // step, -(-rows.stop // step)):
        first = number * step
        last = min(first + step, tensor.dense.shape[0])
        values = _read_block(tensor, name, number, first, last)
        low, high = max(first, rows.start), min(last, rows.stop)
        out[low - rows.start : high - rows.start] = values[(slice(low - first, high - first), *part[1:])]
    return out


def _read_block(tensor: Stored, name: str, number: int, first: int, last: int) -> np.ndarray:
    """One block of whole rows, checked."""
    pieces = tensor.pieces
    rows = slice(first, last)
    if "" in pieces:
        others = tuple(slice(0, length) for length in tensor.dense.shape[1:])
        values = read_part(pieces[""], name, (rows, *others))
        _compare(block_check({"": values}), tensor, name, number)
        return values
    stem, columns = name.removesuffix(SUFFIX), tensor.dense.shape[1]
    entries = pieces[COMPRESSED].shape[0]
    with_next = slice(first, min(last + 1, tensor.dense.shape[0]))
    offsets = read_part(pieces[ROW_OFFSETS], stem + ROW_OFFSETS, (with_next,))
    begin, end = int(offsets[0]), int(offsets[last - first]) if len(offsets) > last - first else entries
    if not 0 <= begin <= end <= entries:
        raise _damaged(tensor, name, number)
    bitmask = read_part(pieces[BITMASK], stem + BITMASK, (rows, slice(0, pieces[BITMASK].shape[1])))
    compressed = read_part(pieces[COMPRESSED], stem + COMPRESSED, (slice(begin, end),))
    offsets = offsets[: last - first]
    found = {ROW_OFFSETS: offsets, BITMASK: bitmask, COMPRESSED: compressed}
    _compare(block_check(found), tensor, name, number)
    counts = count_bits(bitmask)
    if not np.array_equal(begin + np.cumsum(counts) - counts, offsets):
        raise _damaged(tensor, name, number)
    try:
        return expand_rows(bitmask, compressed, columns)
    except ValueError as error:
        raise _damaged(tensor, name, number) from error


def _compare(check: int, tensor: Stored, name: str, number: int) -> None:
    if number >= len(tensor.checks) or check != tensor.checks[number]:
        raise _damaged(tensor, name, number)


def _damaged(tensor: Stored, name: str, number: int) -> InputError:
    first = number * tensor.rows
    last = min(first + tensor.rows, tensor.dense.shape[0])
    path = next(iter(tensor.pieces.values())).path
    return InputError(f"{path}: tensor {name} is damaged in rows {first} to {last - 1}; copy the folder again")
