"""JSON files that carry their own checksum, and tables of the files beside them with theirs."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from efx_jax.errors import InputError
from efx_jax.files import atomic_write, sha256_of
from efx_jax.weights.config_json import read_json

_SEAL = "sha256"
FILE_TABLE = {"*": {"bytes": int, "sha256": str}}
"""A `file_table`, for `check_layout`."""


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with the SHA-256 of its own text under "sha256".

    Raises:
        InputError: the disk is full or the place is not writable.
    """
    atomic_write(path, _text(content))


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote, without the seal.

    Raises:
        InputError: the file is missing, or not byte for byte what was written.
    """
    content = read_json(path)
    content.pop(_SEAL, None)
    if path.read_bytes() != _text(content).encode():
        raise InputError(f"{path}: is damaged: its SHA-256 is not the one that it names; copy the folder again")
    return content


def file_table(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> size in bytes and SHA-256 of some files of a folder."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in sorted(names)
    }


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuses file names that lead out of their folder: a seal is no proof, as anyone who writes a file can seal it.

    Args:
        path: the sealed file that holds the names.
        names: the names, with "/" between folders.

    Raises:
        InputError: a name is absolute or has "..".
    """
    for name in names:
        if not is_inner_name(name):
            raise InputError(f"{path}: names the file {name!r}, expected one within its folder; do not trust it")


def is_inner_name(name: str) -> bool:
    """Whether a file of that name lies within its folder, on any system."""
    parts = PurePosixPath(name).parts
    outside = not parts or ".." in parts or parts[0] == "/" or "\\" in name or "\0" in name
    return not outside and not PureWindowsPath(name).drive


def check_layout(path: Path, value: Any, layout: Any, where: str = "") -> None:
    """Refuses a sealed file whose fields are missing or of the wrong type, as one written by hand may be.

    Args:
        path: the file.
        value: its content, or a part of it.
        layout: what it must be: a type or a tuple of types (an int is never negative), `[layout]` for a list,
            `{"*": layout}` for an object with any names, or name -> layout for one with at least these.
        where: names of the fields that enclose the part.

    Raises:
        InputError: the first field that does not fit.
    """
    if isinstance(layout, dict):
        fits = isinstance(value, dict) and ("*" in layout or layout.keys() <= value.keys())
    elif isinstance(layout, list):
        fits = isinstance(value, list)
    else:
        fits = isinstance(value, layout) and not isinstance(value, bool) and not (type(value) is int and value < 0)
    if not fits:
        raise InputError(f"{path}: {where or 'the file'} is not what efx_jax writes there; copy the folder again")
    if isinstance(layout, dict):
        for name in value if "*" in layout else layout:
            check_layout(path, value[name], layout.get(name, layout.get("*")), f"{where} {name}".strip())
    elif isinstance(layout, list):
        for item in value:
            check_layout(path, item, layout[0], where)


def check_files(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a folder whose files are not those of a `file_table`.

    Raises:
        InputError: the first file that is missing or differs.
    """
    for name, expected in table.items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file}: is missing; copy the folder again")
        found = file.stat().st_size
        if found != expected["bytes"]:
            raise InputError(f"{file}: has {found:,} bytes, expected {expected['bytes']:,}; copy the folder again")
        digest = sha256_of(file)
        if digest != expected["sha256"]:
            raise InputError(
                f"{file}: is damaged: its SHA-256 is {digest[:12]}..., expected {expected['sha256'][:12]}...; "
                "copy the folder again"
            )


def _text(content: Mapping[str, Any]) -> str:
    bare = json.dumps(content, indent=1)
    seal = hashlib.sha256(bare.encode()).hexdigest()
    return json.dumps({**content, _SEAL: seal}, indent=1) + "\n"
