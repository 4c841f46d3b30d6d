"""Finds a model's shapes without reading its weights, for planning runs whose checkpoint is elsewhere."""

import dataclasses
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from efx_jax.config_io import config_folder
from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec, spec_from_config
from efx_jax.weights.config_json import read_json
from efx_jax.weights.fetch import QUICKSTART, hub_config, local_path, model_on_hub
from efx_jax.weights.hf import open_checkpoint
from efx_jax.weights.orbax import is_orbax_folder
from efx_jax.weights.packed_file import is_packed_folder
from efx_jax.weights.source import DTYPES, TensorSource, check_names_and_shapes, leaf_dtype, leaves


@dataclasses.dataclass(frozen=True)
class FoundSpec:
    """A model's description.

    Attributes:
        spec: the model.
        dtype: "float32", "bfloat16" or "float16": what `model.dtype: keep` keeps.
        origin: where it was read from, for messages.
        on_disk: whether weights and tokenizer are on this disk too.
    """

    spec: ModelSpec
    dtype: str
    origin: str
    on_disk: bool


def find_spec(path: str | os.PathLike[str]) -> FoundSpec:
    """The description of the model that `load_pretrained(path)` would load; reads no tensor.

    A folder or file on this disk comes first, with the dtype of its weights if it holds any; then `configs/shapes/`,
    by Hub name or file name; then the Hub, from which only `config.json` is fetched.

    Args:
        path: as for `load_pretrained`; also the file name of a shape, such as "llama-2-7b".

    Raises:
        InputError: no model of that name is described, or its description is damaged or unsupported.
    """
    place = Path(path).expanduser()
    if path == QUICKSTART or place.exists():
        return _on_disk(path)
    shapes = known_shapes()
    name = model_on_hub(path)
    wanted = (str(path) if name is None else name.repository).lower()
    for stem, config in shapes.items():
        if wanted in (stem, str(config["_name_or_path"]).lower()):
            return FoundSpec(spec_from_config(config), _dtype(config), f"configs/shapes/{stem}.json", False)
    if name is not None and name.has_owner:
        config = hub_config(name, f"download the model elsewhere, or plan with one of {_names(shapes)}")
        return FoundSpec(spec_from_config(config), _dtype(config), f"config.json of {path} on the Hub", False)
    raise InputError(f"{place}: no such file or folder; expected a checkpoint, a Hub name, or one of {_names(shapes)}")


def known_shapes() -> dict[str, dict[str, Any]]:
    """Every `configs/shapes/NAME.json` by NAME: published `config.json` files, reduced to what describes the model."""
    return {file.stem: read_json(file) for file in sorted((config_folder() / "shapes").glob("*.json"))}


def _on_disk(path: str | os.PathLike[str]) -> FoundSpec:
    place = local_path(path)
    file = place / "config.json"
    if file.is_file() and not _has_weights(place):
        config = read_json(file)
        return FoundSpec(spec_from_config(config), _dtype(config), str(file), True)
    source = open_checkpoint(place)
    spec = spec_from_config(source.config)
    return FoundSpec(spec, _stored_dtype(source, spec), str(file if file.is_file() else place), True)


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds weights: an index alone, as in a folder with only JSON files, does not count."""
    return is_packed_folder(folder) or is_orbax_folder(folder) or any(folder.glob("*.safetensors"))


def _stored_dtype(source: TensorSource, spec: ModelSpec) -> str:
    """The dtype of most entries of the tree: a GGUF file has float32 norms; an import may differ from its config."""
    check_names_and_shapes(source, spec)
    entries: Counter[str] = Counter()
    for leaf in leaves(spec):
        entries[leaf_dtype(source, leaf)] += math.prod(leaf.shape)
    return entries.most_common(1)[0][0]


def _dtype(config: dict[str, Any]) -> str:
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in DTYPES else "float32"


def _names(shapes: dict[str, dict[str, Any]]) -> str:
    return ", ".join(shapes)
