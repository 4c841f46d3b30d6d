"""One safetensors file: checked when opened and read part by part; written by laying it out, then filling in parts.

The format: eight bytes with the header's length, a JSON header with every tensor's dtype, shape and byte range, then
the bytes in that order, little-endian (https://github.com/huggingface/safetensors#format).
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from efx_jax.errors import InputError, first_line
from efx_jax.weights import byte_ranges
from efx_jax.weights.byte_ranges import Part, part_shape, row_blocks
from efx_jax.weights.source import DTYPES, TensorSource

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "uint8": "U8"}
_NAMES = {code: name for name, code in _CODES.items()}
STORED = DTYPES | {"int64": np.dtype(np.int64), "uint8": np.dtype(np.uint8)}
"""The dtypes that a file may hold: `DTYPES` for a checkpoint's tensors, the others only in our own files."""
# How much is brought to the host at a time: large enough for any disk, small beside any model.
_BLOCK_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, shape and dtype ("float32", ...), and the byte where it begins."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


def read_header(path: Path, integers: bool = False) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, in the order of the header; reads none of them.

    Args:
        path: the file.
        integers: whether int64 and uint8 tensors are expected too.

    Raises:
        InputError: the file is missing, truncated or not a safetensors file, or holds a tensor of an unexpected dtype,
            such as an integer or float8.
    """
    return parse_header(read_header_text(path), path, integers)


def parse_header(text: bytes, path: Path, integers: bool = False) -> dict[str, Entry]:
    """What `read_header` returns, from the header's text, which need not come from the file itself."""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        sound = all(map(_is_sound, header.values()))
    except (ValueError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"{path}: its header is none of a safetensors file; download the file again")
    allowed = [code for name, code in _CODES.items() if integers or name in DTYPES]
    for name, fields in header.items():
        if fields["dtype"] not in allowed:
            raise InputError(
                f"{path}: tensor {name} has dtype {fields['dtype']}, expected one of {', '.join(allowed)}; get the "
                "checkpoint in one of these"
            )
    return {
        name: Entry(path, tuple(fields["shape"]), _NAMES[fields["dtype"]], 8 + len(text) + fields["data_offsets"][0])
        for name, fields in header.items()
    }


def _is_sound(fields: Any) -> bool:
    """Whether a tensor has a dtype, a shape, a beginning and an end."""
    if not isinstance(fields, dict) or not isinstance(fields.get("dtype"), str):
        return False
    shape, place = fields.get("shape"), fields.get("data_offsets")
    numbers = [*shape, *place] if isinstance(shape, list) and isinstance(place, list) and len(place) == 2 else [-1]
    return all(type(number) is int and number >= 0 for number in numbers)


def read_header_text(path: Path) -> bytes:
    """The JSON header of a safetensors file, verbatim, with the blanks that pad it.

    Raises:
        InputError: the file is missing, truncated or not a safetensors file.
    """
    try:
        # `safe_open` checks that the header is sound and that the file holds every byte that the header promises.
        with open(path, "rb") as file, safe_open(path, framework="numpy"):
            return file.read(int.from_bytes(file.read(8), "little"))
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        raise InputError(f"{path}: cannot be read as safetensors ({reason}); download the file again") from error


def read_part(entry: Entry, name: str, part: Part) -> np.ndarray:
    """Reads one part of a tensor, and no other byte from the disk.

    Raises:
        InputError: the file changed or cannot be read.
    """
    out = np.empty(part_shape(part), STORED[entry.dtype])
    try:
        byte_ranges.read_part(entry.path, entry.start, out, entry.shape, part)
    except (OSError, EOFError) as error:
        raise InputError(f"{entry.path}: tensor {name} cannot be read ({error}); download the file again") from error
    return out


def create(path: Path, source: TensorSource, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> None:
    """Creates a file at full size with its header, for `fill`; its tensors are zeros until then.

    Args:
        path: the file.
        source: where the tensors will be read from.
        names: the tensors to write.
        metadata: the header's metadata besides the format.
    """
    names = list(names)
    shapes = {name: source.shapes[name] for name in names}
    # transformers refuses a file whose metadata do not name the framework's format.
    lay_out(path, shapes, {name: source.dtypes[name] for name in names}, {"format": "pt"} | dict(metadata or {}))


def lay_out(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], metadata: Mapping[str, str]
) -> None:
    """Creates a file of tensors that are zeros until they are written.

    Args:
        path: the file.
        shapes: name -> shape.
        dtypes: name -> a name in `STORED`; wider dtypes come first in the file, so every tensor is aligned.
        metadata: the header's metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(shapes, key=lambda name: -STORED[dtypes[name]].itemsize):
        start, end = end, end + array_bytes(shapes[name], dtypes[name])
        header[name] = {"dtype": _CODES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.truncate(8 + len(text) + end)


def change_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Replaces the values of some keys of a file's metadata by others of the same length.

    Raises:
        ValueError: the header would become longer.
    """
    text = read_header_text(path)
    header = json.loads(text)
    header["__metadata__"] |= metadata
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(len(text))
    if len(changed) != len(text):
        raise ValueError(f"{path}: the header has room for {len(text)} bytes, not for {len(changed)}")
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(changed)


def fill(path: Path, source: TensorSource) -> None:
    """Writes what this process holds of the tensors into a file of `create`, and touches no other byte.

    Args:
        path: the file.
        source: where the tensors are read from, with one block of rows in memory at a time.

    Raises:
        InputError: a number that is not finite, or not finite in the file's dtype.
        OSError: the disk is full.
    """
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for name, entry in read_header(path).items():
            for part in source.parts(name):
                row_bytes = tensor_bytes(source, name) // entry.shape[0]
                for block in row_blocks(part, row_bytes, _BLOCK_BYTES):
                    values = np.ascontiguousarray(source.read_part(name, block), DTYPES[entry.dtype])
                    if not np.isfinite(values).all():
                        raise InputError(
                            f"{source.path}: tensor {name} holds numbers that are not finite in {entry.dtype}; get an "
                            "intact checkpoint, or choose a dtype of wider range"
                        )
                    byte_ranges.write_part(descriptor, entry.start, values, entry.shape, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_bytes(source: TensorSource, name: str) -> int:
    """Size of one tensor in bytes."""
    return array_bytes(source.shapes[name], source.dtypes[name])


def array_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size of an array in bytes; `dtype` is a name in `STORED`."""
    return math.prod(shape) * STORED[dtype].itemsize
