"""One base, many experts: what a run has changed in its base, without the base itself.

```
FOLDER/bundle.json          the base it belongs to, what its export must be, and the SHA-256 of every other file
FOLDER/masks.safetensors    q_proj ...: uint8 [L, O, ceil(I/8)], packed as in `efx_jax.masks`
FOLDER/adapter.safetensors  lora_a.q_proj [L,R,I], lora_b.q_proj [L,O,R], ...: float32
FOLDER/moved.safetensors    only if events have rewritten the base: P.compressed, the kept entries of P.weight row by
                            row, or the whole P.weight if no mask applies to it, in the dtype of the export
FOLDER/others/              files of the export that cannot be made from the base
```

Folding these into the base with `weights.merged` gives the run's export, bit for bit.
"""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.model.spec import ModelSpec, config_from_spec, linear_shapes, spec_from_config
from efx_jax.weights.assemble import assemble
from efx_jax.weights.bitmask import COMPRESSED, SUFFIX, count_bits, expand_rows
from efx_jax.weights.byte_ranges import Part, row_blocks, whole
from efx_jax.weights.expert import write_expert
from efx_jax.weights.hf import open_model
from efx_jax.weights.merged import layer_places, leaf_dtypes, merged_source
from efx_jax.weights.params import params_source
from efx_jax.weights.safetensors_file import Entry, read_header, read_part, tensor_bytes
from efx_jax.weights.sealed import FILE_TABLE, check_files, check_layout, check_names, file_table, read_sealed
from efx_jax.weights.source import TensorSource, cast, leaves
from efx_jax.weights.sparsity import Asked, pruned_entries

MANIFEST, MASKS, ADAPTER, MOVED, OTHERS = (
    "bundle.json",
    "masks.safetensors",
    "adapter.safetensors",
    "moved.safetensors",
    "others",
)
FORMAT, VERSION = "efx-bundle", 1
_LAYOUT = {
    "base": {"path": str, "sha256": str, "config": {}},
    "dtype": (str, type(None)),
    "scale": (int, float),
    "patterns": {"*": str},
    "sparsity": (int, float),
    "transformers": (str, type(None)),
    "others": [str],
    "files": FILE_TABLE,
    "export": FILE_TABLE,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """An expert without its base.

    Attributes:
        folder: its folder.
        manifest: `bundle.json`.
        adapters: numpy arrays, or None.
        masks: linear -> uint8 `[L,O,ceil(I/8)]`.
        moved: Hugging Face name -> location of its rewritten entries.
    """

    folder: Path
    manifest: dict[str, Any]
    adapters: Adapters | None
    masks: dict[str, np.ndarray]
    moved: dict[str, Entry]


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Opens a bundle after checking every byte of it; moved weights stay on disk.

    Raises:
        InputError: not a bundle, another version, a missing or damaged file, or arrays of another model.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: is not a bundle; expected one of convert_weights.py bundle, with {MANIFEST}")
    manifest = read_sealed(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')} {manifest.get('version')}"
        raise InputError(f"{folder / MANIFEST}: expected {FORMAT} {VERSION}, found {found}; update efx_jax")
    check_layout(folder / MANIFEST, manifest, _LAYOUT)
    check_names(folder / MANIFEST, [*manifest["files"], *manifest["others"], *manifest["export"]])
    check_files(folder, manifest["files"])
    masks = _arrays(folder / MASKS) if MASKS in manifest["files"] else {}
    adapters = None
    if ADAPTER in manifest["files"]:
        arrays = _arrays(folder / ADAPTER)
        lora_a, lora_b = (_below(arrays, name) for name in ("lora_a", "lora_b"))
        adapters = Adapters(lora_a=lora_a, lora_b=lora_b, scale=manifest["scale"])
    moved = read_header(folder / MOVED) if MOVED in manifest["files"] else {}
    by_name = {name.removesuffix(COMPRESSED).removesuffix(SUFFIX) + SUFFIX: entry for name, entry in moved.items()}
    bundle = Bundle(folder, manifest, adapters, masks, by_name)
    _check_arrays(bundle, spec_from_config(manifest["base"]["config"]))
    return bundle


def load_bundle(
    path: str | os.PathLike[str],
) -> tuple[Adapters | None, dict[str, jax.Array] | None, dict[str, jax.Array]]:
    """The arrays of a bundle, for `efx_jax.forward` on its base.

    With `params, spec = load_pretrained(base, dtype=None)` the expert's logits are
    `forward({**params, "layers": params["layers"] | moved}, tokens, spec, adapters, masks)`.

    Args:
        path: folder of `convert_weights.py bundle`.

    Returns:
        adapters; masks, linear -> uint8 `[L,O,ceil(I/8)]`, or None for a dense expert; and the linears that events have
        rewritten, name -> `[L,O,I]`, 0 where pruned, or {} if the base is unchanged.

    Raises:
        InputError: not a bundle, or a damaged one.
    """
    bundle = open_bundle(path)
    spec = spec_from_config(bundle.manifest["base"]["config"])
    moved = {}
    for leaf in leaves(spec):
        if leaf.names[0] in bundle.moved:
            stacked = [
                _moved_rows(bundle, name, leaf.path[-1], i, whole(leaf.tensor_shape))
                for i, name in enumerate(leaf.names)
            ]
            moved[leaf.path[-1]] = jnp.asarray(np.stack(stacked))
    adapters = None if bundle.adapters is None else jax.tree.map(jnp.asarray, bundle.adapters)
    return adapters, {name: jnp.asarray(mask) for name, mask in bundle.masks.items()} or None, moved


def apply_bundle(base: str | os.PathLike[str], path: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Writes the export of the run that a bundle was made from, the same bytes in every file.

    Args:
        base: the model that the run started from, in any format that holds the same tensors.
        path: folder of the bundle.
        dst: the folder to make.

    Raises:
        InputError: another base, a damaged bundle, a file that the base does not reproduce (such as a tokenizer made
            from a GGUF file by another version of transformers), `dst` exists, or the disk is full.
    """
    bundle = open_bundle(path)
    source, spec = open_model(base)
    check_base(bundle, source, spec, content_sha256(source, spec))
    rebuild(bundle, source, spec, base, Path(dst), check=True)


def rebuild(
    bundle: Bundle, source: TensorSource, spec: ModelSpec, base: str | os.PathLike[str], dst: Path, check: bool
) -> None:
    """`apply_bundle` after the base has been checked; `check`: whether the files must equal those of the run."""
    manifest = bundle.manifest

    def finish(folder: Path) -> None:
        for name in manifest["others"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / OTHERS / name, folder / name)
        for file in [path for path in folder.rglob("*") if path.is_file()]:
            # Files may have been added to the base since.
            if file.relative_to(folder).as_posix() not in manifest["export"]:
                file.unlink()
        differing = different_files(folder, manifest["export"])
        if differing:
            raise InputError(
                f"{base}: gives another {differing[0]} than the base that {bundle.folder} was made on (of "
                f"{manifest['base']['path']}, with transformers {manifest['transformers']}); bring that back"
            )

    asked = Asked(manifest["patterns"], manifest["sparsity"], pruned_entries(bundle.masks, spec))
    own = moved_source(_own_dtypes(bundle, source, spec), spec, bundle)
    write_expert(dst, own, spec, bundle.adapters, bundle.masks or None, base, asked, finish if check else None)


def bundle_params(bundle: Bundle, params: Mapping[str, Any], spec: ModelSpec, dtype: str | None) -> dict[str, Any]:
    """The expert as the parameter tree that `load_pretrained` gives for its export, from a base already in memory.

    Args:
        bundle: the expert.
        params: the base in its own dtypes, `load_pretrained(base, None)`.
        spec: its model.
        dtype: dtype of the result, see `load_pretrained`.
    """
    base = _own_dtypes(bundle, params_source(params, spec, bundle.folder), spec)
    merged = merged_source(moved_source(base, spec, bundle), spec, bundle.adapters, bundle.masks or None)
    return assemble(merged, spec, dtype)


def moved_source(base: TensorSource, spec: ModelSpec, bundle: Bundle) -> TensorSource:
    """The base as left by a run's events: 0 where a rewritten matrix is pruned."""
    if not bundle.moved:
        return base
    places = layer_places(spec)

    def read(name: str, part: Part) -> np.ndarray:
        if name not in bundle.moved:
            return base.read_part(name, part)
        return _moved_rows(bundle, name, *places[name], part)

    return dataclasses.replace(base, read_part=read)


def check_base(bundle: Bundle, source: TensorSource, spec: ModelSpec, digest: str) -> None:
    """Refuses a base other than the bundle's.

    Args:
        bundle: the bundle.
        source: the given checkpoint.
        spec: its model.
        digest: its `content_sha256`.

    Raises:
        InputError: its tensors or its model differ.
    """
    expected = bundle.manifest["base"]
    described = config_from_spec(spec, "float32")
    other = next((name for name, value in expected["config"].items() if described.get(name) != value), None)
    if other is not None:
        found = f"{other} {described.get(other)}, expected {expected['config'][other]}"
    elif digest != expected["sha256"]:
        found = f"tensors of SHA-256 {digest[:12]}..., expected {expected['sha256'][:12]}..."
    else:
        return
    raise InputError(
        f"{source.path}: is not the base of {bundle.folder}: {found}; give the checkpoint that it was trained on "
        f"({expected['path']})"
    )


def content_sha256(source: TensorSource, spec: ModelSpec) -> str:
    """SHA-256 over every tensor of a model: name, dtype, shape and bytes, in the order of `leaves`."""
    digest = hashlib.sha256()
    for name in (name for leaf in leaves(spec) for name in leaf.names):
        shape = source.shapes[name]
        digest.update(f"{name} {source.dtypes[name]} {list(shape)}\n".encode())
        for block in row_blocks(whole(shape), tensor_bytes(source, name) // shape[0]):
            digest.update(np.ascontiguousarray(source.read_part(name, block)).view(np.uint8).data)
    return digest.hexdigest()


def different_files(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names in a `file_table` whose file in a folder is missing or differs."""
    there = [name for name in table if (folder / name).is_file()]
    found = file_table(folder, there)
    return sorted(name for name in table if found.get(name) != table[name])


def _check_arrays(bundle: Bundle, spec: ModelSpec) -> None:
    """Refuses arrays that do not fit the bundle's own model: a seal is no proof, as anyone who writes them can seal."""
    linears, masks = linear_shapes(spec), bundle.masks
    places = {name: place for name, place in layer_places(spec).items() if place[0] in linears}
    lora_a, lora_b = ({}, {}) if bundle.adapters is None else (bundle.adapters.lora_a, bundle.adapters.lora_b)
    fits = lora_a.keys() == lora_b.keys() and lora_a.keys() | masks.keys() <= linears.keys()
    for name, (out_dim, in_dim) in linears.items() if fits else ():
        rank = lora_b[name].shape[-1] if name in lora_b and lora_b[name].ndim else 0
        for arrays, shape, dtype in (
            (masks, (out_dim, -(-in_dim // 8)), np.uint8),
            (lora_a, (rank, in_dim), np.float32),
            (lora_b, (out_dim, rank), np.float32),
        ):
            if name in arrays:
                fits = fits and arrays[name].shape == (spec.num_layers, *shape) and arrays[name].dtype == dtype
    # Events rewrite all linears or none.
    fits = fits and bundle.moved.keys() in (set(), places.keys())
    for name, entry in bundle.moved.items() if fits else ():
        leaf, layer = places[name]
        kept = (int(count_bits(masks[leaf][layer]).sum()),) if leaf in masks else linears[leaf]
        fits = fits and entry.shape == kept
    if not fits:
        raise InputError(f"{bundle.folder}: its arrays are not those of the model that {MANIFEST} names; make it again")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return {
        name: read_part(entry, name, whole(entry.shape)) for name, entry in read_header(path, integers=True).items()
    }


def _below(arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, Any]:
    return {name.removeprefix(f"{kind}."): array for name, array in arrays.items() if name.startswith(f"{kind}.")}


def _own_dtypes(bundle: Bundle, source: TensorSource, spec: ModelSpec) -> TensorSource:
    """The base in the dtypes that the run used for it (`model.dtype`)."""
    dtype = bundle.manifest["dtype"]
    return leaf_dtypes(source if dtype is None else cast(source, dtype), spec)


def _moved_rows(bundle: Bundle, name: str, leaf: str, layer: int, part: Part) -> np.ndarray:
    """A part of a rewritten matrix."""
    entry, mask = bundle.moved[name], bundle.masks.get(leaf)
    if mask is None:
        return read_part(entry, name, part)
    rows, columns = part
    counts = count_bits(mask[layer])
    begin, end = int(counts[: rows.start].sum()), int(counts[: rows.stop].sum())
    kept = read_part(entry, name, (slice(begin, end),))
    in_dim = _width(bundle, leaf)
    return expand_rows(mask[layer, rows], kept, in_dim)[:, columns]


def _width(bundle: Bundle, leaf: str) -> int:
    """I of a linear."""
    spec = spec_from_config(bundle.manifest["base"]["config"])
    return next(found.tensor_shape[1] for found in leaves(spec) if found.path[-1] == leaf)
