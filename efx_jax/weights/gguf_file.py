"""A GGUF file: its metadata, its table of tensors, and one tensor at a time as a numpy array.

The header is parsed here rather than by `gguf.GGUFReader`, which keeps one memmap object per vocabulary string
(160 MB for a vocabulary of 49,152) and on a truncated file raises whatever numpy happens to raise. The block formats
are left to the `gguf` package. Format: the GGUF specification, `docs/gguf.md` of github.com/ggml-org/ggml.
"""

import dataclasses
import importlib.util
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from efx_jax.errors import InputError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9

FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
QUANTIZED_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_ELEMENTS_PER_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor's place in the file: `shape` in numpy's order (rows first), `start` and `nbytes` in bytes."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A parsed header: every metadata value under its own key, every tensor under its GGUF name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: str | Path) -> GGUFFile:
    """Reads the metadata and the table of tensors, and checks that the file holds every byte the table promises.

    Args:
        path: a little-endian GGUF file, version 2 or 3.

    Returns:
        The header; no tensor data is read.

    Raises:
        InputError: not a GGUF file, another version, part of a split file, a truncated file, or an unsupported
            quantisation type.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: reading GGUF needs the gguf package; run: pip install gguf")
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a GGUF file")
    with path.open("rb") as file:
        header = _Cursor(file, path, path.stat().st_size)
        _check_magic(header)
        tensor_count, key_count = header.unpack("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = header.string()
            metadata[key] = header.value(header.unpack("I")[0])
        _check_is_whole(header, metadata)
        tensors = [_tensor_entry(header) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise InputError(f"{path}: general.alignment {alignment!r} is not a positive integer; the file is damaged")
        data_start = -(-file.tell() // alignment) * alignment
    table = {tensor.name: dataclasses.replace(tensor, start=data_start + tensor.start) for tensor in tensors}
    if len(table) != len(tensors):
        raise InputError(f"{path}: {len(tensors) - len(table)} tensor names occur twice; the file is damaged")
    _check_extent(header, table)
    return GGUFFile(path=path, metadata=metadata, tensors=table)


def tensor_dtype(tensor: GGUFTensor) -> str:
    """Name of the dtype that `read_rows` returns: the tensor's own for a float type, float32 for a quantised one."""
    return FLOAT_TYPES.get(tensor.type_name, "float32")


def read_rows(path: Path, tensor: GGUFTensor, rows: np.ndarray, columns: slice = slice(None)) -> np.ndarray:
    """Reads rows of one tensor, dequantised to float32 if it is stored in blocks.

    Args:
        path: the file the tensor was found in.
        tensor: its entry in the header.
        rows: indices of the rows, in the desired order.
        columns: the columns to keep.

    Returns:
        A new array of those rows and columns (of those entries, if the tensor has one axis). Besides it, only the
        rows being unpacked are in memory.
    """
    import gguf

    stored = np.asarray(np.memmap(path, np.uint8, "r", offset=tensor.start, shape=(tensor.nbytes,)))
    if tensor.type_name in FLOAT_TYPES:
        values = stored.view(ml_dtypes.bfloat16 if tensor.type_name == "BF16" else tensor_dtype(tensor))
        values = values.reshape(tensor.shape)
        return values[rows] if values.ndim == 1 else values[:, columns][rows]
    stored = stored.reshape(tensor.shape[0], -1)
    kept = len(range(*columns.indices(tensor.shape[1])))
    out = np.empty((len(rows), kept), np.float32)
    step = max(1, _ELEMENTS_PER_CHUNK // tensor.shape[1])
    for start in range(0, len(rows), step):
        chunk = stored[rows[start : start + step]]
        out[start : start + step] = gguf.dequantize(chunk, gguf.GGMLQuantizationType[tensor.type_name])[:, columns]
    return out


@dataclasses.dataclass(frozen=True)
class _Cursor:
    """The open file, with reads that never go past its end."""

    file: BinaryIO
    path: Path
    size: int

    def take(self, count: int) -> bytes:
        position = self.file.tell()
        if count > self.size - position:
            raise InputError(
                f"{self.path}: truncated or damaged GGUF header: {count} bytes expected at byte {position}, "
                f"{self.size - position} left; fetch the file again"
            )
        return self.file.read(count)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def string(self) -> str:
        raw = self.take(self.unpack("Q")[0])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: a string of the GGUF header is not UTF-8 ({error.reason})") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALAR_FORMATS:
            raise InputError(f"{self.path}: metadata value type {kind} is unknown; the GGUF header is damaged")
        (value,) = self.unpack(_SCALAR_FORMATS[kind])
        # 1e-5 is stored as a float32; its shortest decimal form is the number that the model's config.json had.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def array(self) -> list[Any]:
        kind, length = self.unpack("IQ")
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        if kind not in _SCALAR_FORMATS:
            raise InputError(f"{self.path}: metadata array of type {kind} is not supported; the header may be damaged")
        layout = "<" + _SCALAR_FORMATS[kind]
        raw = self.take(struct.calcsize(layout) * length)
        return [value for (value,) in struct.iter_unpack(layout, raw)]


def _check_magic(header: _Cursor) -> None:
    magic = header.file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise InputError(f"{header.path}: not a GGUF file: it begins with {magic!r}, expected {_MAGIC!r}")
    (version,) = header.unpack("I")
    if version not in _VERSIONS:
        raise InputError(
            f"{header.path}: GGUF version {version} is not supported (or the file is big-endian); expected version 2 "
            "or 3, little-endian; convert the model again with a current llama.cpp"
        )


def _check_is_whole(header: _Cursor, metadata: dict[str, Any]) -> None:
    count = metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise InputError(
            f"{header.path}: is one of the {count} files of a split GGUF, expected one file; join them: "
            "llama-gguf-split --merge FIRST_FILE JOINED.gguf"
        )


def _tensor_entry(header: _Cursor) -> GGUFTensor:
    """One row of the table of tensors; `start` is still relative to the start of the data."""
    import gguf

    name = header.string()
    (rank,) = header.unpack("I")
    if not 1 <= rank <= 4:
        raise InputError(f"{header.path}: tensor {name!r} has {rank} dimensions, expected 1 to 4; the file is damaged")
    shape = tuple(reversed(header.unpack(f"{rank}Q")))
    type_id, start = header.unpack("IQ")
    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    type_name = known.get(type_id, f"type {type_id}")
    if type_name not in (*FLOAT_TYPES, *QUANTIZED_TYPES):
        raise InputError(
            f"{header.path}: tensor {name!r} is stored as {type_name}, which is not supported; expected one of "
            f"{', '.join((*FLOAT_TYPES, *QUANTIZED_TYPES))}; use another quantisation of the model"
        )
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    elements = math.prod(shape)
    if elements == 0 or shape[-1] % block or (block > 1 and rank != 2):
        raise InputError(
            f"{header.path}: tensor {name!r} of shape {list(shape)} does not divide into rows of {type_name} blocks "
            f"of {block}; the file is damaged"
        )
    return GGUFTensor(name, type_name, shape, start, elements // block * block_bytes)


def _check_extent(header: _Cursor, tensors: dict[str, GGUFTensor]) -> None:
    for tensor in tensors.values():
        if tensor.start + tensor.nbytes > header.size:
            raise InputError(
                f"{header.path}: truncated GGUF file: tensor {tensor.name!r} ends at byte "
                f"{tensor.start + tensor.nbytes}, the file has {header.size}; fetch the file again"
            )
