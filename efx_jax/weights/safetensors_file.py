"""One safetensors file: opened with checks, read tensor by tensor, written as a stream."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from efx_jax.errors import InputError
from efx_jax.weights.source import DTYPES, TensorSource

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NAMES = {code: name for name, code in _CODES.items()}


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and dtypes of a safetensors file's tensors, by name; reads no tensor.

    Raises:
        InputError: the file is missing, truncated, no safetensors file, or holds an integer or float8 tensor.
    """
    shapes, dtypes = {}, {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                entry = file.get_slice(name)
                shapes[name], dtypes[name] = tuple(entry.get_shape()), entry.get_dtype()
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as safetensors ({reason}); download the file again") from error
    for name, code in dtypes.items():
        if code not in _NAMES:
            raise InputError(f"{path}: tensor {name} has dtype {code}, expected one of {', '.join(_NAMES)}")
    return shapes, {name: _NAMES[code] for name, code in dtypes.items()}


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Reads one tensor. The file is opened anew each time, so its pages do not add up in resident memory.

    Raises:
        InputError: the file changed or cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: tensor {name} cannot be read ({error}); download the file again") from error


def write_tensors(path: Path, source: TensorSource, names: Iterable[str]) -> None:
    """Writes a safetensors file with one tensor in memory at a time.

    The format: eight bytes with the header's length, a JSON header with every tensor's dtype, shape and byte range,
    then the bytes in that order, little-endian (https://github.com/huggingface/safetensors#format).

    Args:
        path: the file to write.
        source: where the tensors are read from.
        names: the tensors to write; wider dtypes come first in the file, so every tensor is aligned.
    """
    names = sorted(names, key=lambda name: -DTYPES[source.dtypes[name]].itemsize)
    # transformers refuses a file whose metadata does not name the framework's layout.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensor_bytes(source, name)
        header[name] = {
            "dtype": _CODES[source.dtypes[name]],
            "shape": list(source.shapes[name]),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = np.ascontiguousarray(source.read(name), DTYPES[source.dtypes[name]])
            file.write(tensor.reshape(-1).view(np.uint8).data)


def tensor_bytes(source: TensorSource, name: str) -> int:
    """Size of one tensor in bytes."""
    return math.prod(source.shapes[name]) * DTYPES[source.dtypes[name]].itemsize
