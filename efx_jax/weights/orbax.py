"""Orbax folders: the parameter tree on disk, beside `config.json`, the tokenizer and a list of its files.

```
DST/params/        Orbax checkpoint of the tree of `param_shapes(spec)`
DST/config.json    the original's content, including its dtype, whatever the dtype of the tensors is
DST/manifest.json  dtypes: Hugging Face tensor name -> dtype for an export; files: size of each file in params/
DST/tokenizer...   and the other small files of the original
```
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efx_jax.errors import InputError, first_line
from efx_jax.model.spec import spec_from_config
from efx_jax.weights.byte_ranges import Part
from efx_jax.weights.config_json import check_tokenizer_fits, read_json
from efx_jax.weights.source import DTYPES, TensorSource, leaves

_PARAMS, _MANIFEST = "params", "manifest.json"
# So that a layer, or some of its rows, can be read without the rest of its leaf.
_CHUNK_BYTES = 1 << 22
# Files are kept in memory until they are full, several of them if the disk is slow; Orbax's default is 2 GB.
_FILE_BYTES = 1 << 24


def is_orbax_folder(path: Path) -> bool:
    """Whether a folder was made by `write_orbax`."""
    return (path / _PARAMS).is_dir() and (path / _MANIFEST).is_file()


def write_orbax(folder: Path, params: Mapping[str, Any], config: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    """Fills a folder with a parameter tree, its `config.json` and its tensors' dtypes.

    Args:
        folder: an existing folder (`efx_jax.files.atomic_folder` gives one that appears only when it is complete).
        params: the tree of `param_shapes(spec)`, jax arrays; on the CPU, as Orbax would first copy all of it there.
        config: raw `config.json`.
        dtypes: Hugging Face tensor name -> dtype for an export; differs from the leaf's if its layers differ in dtype.
    """
    import jax
    import orbax.checkpoint as ocp

    top = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), dict(params))
    layers = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,)), params["layers"])
    args = ocp.args.PyTreeSave(
        dict(params), save_args={**top, "layers": layers}, ocdbt_target_data_file_size=_FILE_BYTES
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)) as checkpointer:
        checkpointer.save((folder / _PARAMS).absolute(), args=args)
    manifest = {"dtypes": dict(dtypes), "files": _file_sizes(folder / _PARAMS)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def open_orbax(path: str | os.PathLike[str]) -> TensorSource:
    """Opens a folder of `write_orbax`; reads no tensor.

    Orbax itself reads whole leaves, so parts are read from the underlying arrays: zarr arrays in OCDBT files, each
    under the names in its path (https://google.github.io/tensorstore/kvstore/ocdbt).

    Raises:
        InputError: a file is missing or damaged, or the leaves are not those of `config.json`.
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    dtypes = _checked_manifest(folder)
    spec = spec_from_config(config)
    stored = _stored_shapes(folder / _PARAMS)
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[tuple[str, ...], int | None]] = {}
    for leaf in leaves(spec):
        found = stored.pop(leaf.path, None)
        if found != leaf.shape:
            raise InputError(
                f"{folder}: {'.'.join(leaf.path)} has shape {found and list(found)}, expected {list(leaf.shape)}; "
                "import the checkpoint again"
            )
        shapes |= dict.fromkeys(leaf.names, leaf.tensor_shape)
        places |= {name: (leaf.path, layer if leaf.stacked else None) for layer, name in enumerate(leaf.names)}
    if stored or set(dtypes) != set(shapes) or not set(dtypes.values()) <= set(DTYPES):
        raise InputError(f"{folder}: {_MANIFEST} and {_PARAMS}/ do not fit config.json; import the checkpoint again")
    check_tokenizer_fits(folder, config)
    arrays = {leaf.path: _open_array(folder / _PARAMS, leaf.path) for leaf in leaves(spec)}

    def read_part(name: str, part: Part) -> np.ndarray:
        leaf_path, layer = places[name]
        index = part if layer is None else (layer, *part)
        try:
            values = arrays[leaf_path][index].read().result()
        except ValueError as error:
            raise _damaged(folder / _PARAMS, error) from error
        return np.asarray(values).astype(DTYPES[dtypes[name]], copy=False)

    return TensorSource(folder, config, shapes, dtypes, read_part)


def _checked_manifest(folder: Path) -> dict[str, str]:
    """The dtypes, after checking every file's size: given a truncated file, Orbax prints pages of tracebacks."""
    manifest = read_json(folder / _MANIFEST)
    dtypes, files = manifest.get("dtypes"), manifest.get("files")
    if not isinstance(dtypes, dict) or not isinstance(files, dict):
        raise InputError(f"{folder / _MANIFEST}: lacks dtypes or files; import the checkpoint again")
    found = _file_sizes(folder / _PARAMS)
    for name, size in files.items():
        if found.get(name) != size:
            raise InputError(
                f"{folder / _PARAMS / name}: has {found.get(name, 0)} bytes, expected {size}; "
                "import the checkpoint again"
            )
    return dtypes


def _file_sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _stored_shapes(folder: Path) -> dict[tuple[str, ...], tuple[int, ...]]:
    import jax
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    try:
        tree = handler.metadata(folder.absolute()).tree
    except Exception as error:
        raise _damaged(folder, error) from error
    finally:
        handler.close()
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {tuple(key.key for key in path): tuple(array.shape) for path, array in flat}


def _open_array(folder: Path, path: tuple[str, ...]) -> Any:
    import tensorstore

    store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{'.'.join(path)}/"}
    try:
        return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
    except ValueError as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> InputError:
    reason = first_line(error)
    return InputError(f"{folder}: cannot be read as an Orbax checkpoint ({reason}); import the checkpoint again")
