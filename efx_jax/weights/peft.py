"""LoRA adapters as PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, read and written.

A folder may give every module its own rank and alpha. Here adapters are stacked over the layers with one static scale,
so smaller ranks are padded with zero rows of A and zero columns of B, and the ratio of a module's own scale to the
common one is folded into its B: U = W + scale * B A is the same.
"""

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from efx_jax.errors import InputError
from efx_jax.files import atomic_folder
from efx_jax.lora import Adapters, lora_scale
from efx_jax.model.spec import LINEARS, ModelSpec, linear_shapes
from efx_jax.weights.byte_ranges import whole
from efx_jax.weights.peft_config import (
    CONFIG_FILE,
    PeftConfig,
    common_alpha,
    is_adapted,
    module_rank,
    module_scale,
    peft_config_text,
    read_peft_config,
)
from efx_jax.weights.safetensors_file import Entry, read_header, read_part
from efx_jax.weights.source import DTYPES

_WEIGHTS_FILE = "adapter_model.safetensors"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# base_model.model. comes from PeftModel, the next model. from a model with a head, and a name after lora_A from an
# adapter that was saved by hand.
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>(?:model\.)?layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<name>\w+))"
    r"\.lora_(?P<half>[AB])(?:\.\w+)?\.weight"
)


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """An adapter in terms of a run's settings, see `config.LoraConfig`; rank is the largest of all modules."""

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Module:
    """One adapted linear: its full name, its place in the tree, and the tensors of A and B by key."""

    name: str
    linear: str
    layer: int
    tensors: Mapping[str, str]


def adapter_settings(path: str | os.PathLike[str]) -> AdapterSettings:
    """The settings with which a run continues to train a PEFT adapter; reads no tensor and needs no model.

    Raises:
        InputError: as for `load_adapter`, except for what cannot be checked without the model.
    """
    folder = Path(path)
    config, entries = _open(folder)
    return _settings(config, _modules(folder, entries))


def check_adapter(path: str | os.PathLike[str], spec: ModelSpec) -> None:
    """Refuses a PEFT adapter that does not fit a model; reads no tensor.

    Raises:
        InputError: as for `load_adapter`, except for numbers that are not finite.
    """
    _checked(Path(path), spec)


def load_adapter(path: str | os.PathLike[str], spec: ModelSpec) -> Adapters:
    """Reads a LoRA adapter that PEFT has written.

    Args:
        path: folder with `adapter_config.json` and `adapter_model.safetensors`.
        spec: the model that it belongs to.

    Returns:
        `lora_a[name] [L,R,I]` and `lora_b[name] [L,O,R]`, float32, for every linear that is adapted in some layer, with
        zeros in the layers where it is not; R is the largest rank of all modules.

    Raises:
        InputError: a missing or damaged file, an unsupported option, or a tensor that is missing, of the wrong shape,
            not finite, or of a module that the settings do not name.
    """
    config, entries, modules = _checked(Path(path), spec)
    settings = _settings(config, modules)
    scale = lora_scale(settings.rank, settings.alpha, settings.rslora)
    shapes = linear_shapes(spec)
    lora_a, lora_b = {}, {}
    for name in settings.targets:
        out_dim, in_dim = shapes[name]
        lora_a[name] = np.zeros((spec.num_layers, settings.rank, in_dim), np.float32)
        lora_b[name] = np.zeros((spec.num_layers, out_dim, settings.rank), np.float32)
    for module in modules:
        rank = module_rank(config, module.name)
        lora_a[module.linear][module.layer, :rank] = _read(entries, module.tensors["A"])
        factor = np.float32(module_scale(config, module.name) / scale)
        lora_b[module.linear][module.layer, :, :rank] = factor * _read(entries, module.tensors["B"])
    return Adapters(
        lora_a={name: jnp.asarray(array) for name, array in lora_a.items()},
        lora_b={name: jnp.asarray(array) for name, array in lora_b.items()},
        scale=scale,
    )


def save_adapter(
    path: str | os.PathLike[str],
    adapters: Adapters,
    spec: ModelSpec,
    base: str,
    dtype: str = "float32",
    rslora: bool = False,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads on the same base, every key matched.

    Args:
        path: the folder to make.
        adapters: `lora_a[name] [L,R,I]`, `lora_b[name] [L,O,R]`; R is the same everywhere.
        spec: the model that they belong to.
        base: path or Hub name (`owner/name@revision` pins it) of that model, for `AutoPeftModel`.
        dtype: dtype of the tensors: "float32", "bfloat16" or "float16".
        rslora: whether their scale is to be written as alpha / sqrt(R).

    Raises:
        InputError: `path` exists, the disk is full, a shape is not that of the model, or a number exceeds `dtype`.
    """
    targets = [name for name in LINEARS if name in adapters.lora_a]
    rank = _check_adapters(adapters, spec)
    alpha = adapters.scale * (math.sqrt(rank) if rslora else rank)
    if math.isclose(alpha, round(alpha), rel_tol=1e-12):
        alpha = round(alpha)
    tensors = {}
    for name in targets:
        for half, stacked in (("A", adapters.lora_a[name]), ("B", adapters.lora_b[name])):
            for layer, values in enumerate(np.asarray(stacked)):
                key = f"base_model.model.{_module_name(name, layer)}.lora_{half}.weight"
                with np.errstate(over="ignore"):
                    tensors[key] = np.ascontiguousarray(values.astype(DTYPES[dtype]))
                if not np.isfinite(tensors[key].astype(np.float32)).all():
                    raise InputError(f"{path}: {key} has numbers that are not finite in {dtype}; choose float32")
    with atomic_folder(path, needs=sum(tensor.nbytes for tensor in tensors.values())) as partial:
        # Not `save_file`, whose files only their owner may read.
        (partial / _WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        text = peft_config_text(rank, alpha, rslora, targets, base)
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")


def _checked(folder: Path, spec: ModelSpec) -> tuple[PeftConfig, dict[str, Entry], list[_Module]]:
    """A folder's settings, tensors and modules, after checking that all of them fit the model."""
    config, entries = _open(folder)
    modules = _modules(folder, entries)
    _check_modules(folder, config, modules, spec)
    for module in modules:
        rank, (out_dim, in_dim) = module_rank(config, module.name), linear_shapes(spec)[module.linear]
        _check_shape(entries, module.tensors["A"], (rank, in_dim))
        _check_shape(entries, module.tensors["B"], (out_dim, rank))
    return config, entries, modules


def _open(folder: Path) -> tuple[PeftConfig, dict[str, Entry]]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a PEFT adapter: {CONFIG_FILE} and {_WEIGHTS_FILE}")
    config = read_peft_config(folder)
    if not (folder / _WEIGHTS_FILE).is_file():
        pickles = sorted(folder.glob("adapter_model*.bin"))
        found = f"{pickles[0].name} is a pickle, which can run code when it is opened" if pickles else "it is missing"
        raise InputError(f"{folder}: expected {_WEIGHTS_FILE}, but {found}; save the adapter as safetensors")
    return config, read_header(folder / _WEIGHTS_FILE)


def _modules(folder: Path, entries: Mapping[str, Entry]) -> list[_Module]:
    """The modules whose tensors the file holds, both halves of each."""
    halves: dict[str, dict[str, str]] = {}
    places: dict[str, tuple[str, int]] = {}
    for key in sorted(entries):
        match = _KEY.fullmatch(key)
        if match is None or match["name"] not in LINEARS:
            raise InputError(
                f"{folder / _WEIGHTS_FILE}: tensor {key} is no adapter of a linear of a block ({', '.join(LINEARS)}); "
                "adapters of other modules and changed base weights are not supported"
            )
        places[match["module"]] = (match["name"], int(match["layer"]))
        own = halves.setdefault(match["module"], {})
        if match["half"] in own:
            raise InputError(
                f"{folder / _WEIGHTS_FILE}: {own[match['half']]} and {key} are the same tensor of two adapters; "
                "expected one adapter; save each alone"
            )
        own[match["half"]] = key
    if not halves:
        raise InputError(f"{folder / _WEIGHTS_FILE}: holds no tensor; save the adapter again")
    for own in halves.values():
        if len(own) == 1:
            (half, key), other = next(iter(own.items())), "B" if "A" in own else "A"
            lost = key.replace(f".lora_{half}.", f".lora_{other}.")
            raise InputError(f"{folder / _WEIGHTS_FILE}: tensor {lost} is missing beside {key}; save it again")
    return [_Module(name, *places[name], own) for name, own in halves.items()]


def _check_modules(folder: Path, config: PeftConfig, modules: list[_Module], spec: ModelSpec) -> None:
    """Refuses an adapter whose modules are not exactly those that its settings name in this model."""
    path = folder / _WEIGHTS_FILE
    has_head = modules[0].name.startswith("model.")
    every = [_module_name(name, layer, has_head) for layer in range(spec.num_layers) for name in LINEARS]
    for other in ("lm_head", _embedding(has_head)):
        if is_adapted(config, other):
            raise InputError(f"{config.path}: target_modules names {other}; only linears of the blocks may be adapted")
    expected = [name for name in every if is_adapted(config, name)]
    found = {module.name: module for module in modules}
    for name, module in found.items():
        key = module.tensors["A"]
        if name not in every:
            raise InputError(
                f"{path}: tensor {key} has no place in a {spec.model_type} model of {spec.num_layers} layers; choose "
                "the base that the adapter was trained on"
            )
        if name not in expected:
            raise InputError(f"{path}: tensor {key} belongs to no module that {CONFIG_FILE} adapts; save it again")
    for name in expected:
        if name not in found:
            raise InputError(
                f"{path}: the tensors of {name} are missing, which {CONFIG_FILE} adapts; save the adapter again"
            )


def _settings(config: PeftConfig, modules: list[_Module]) -> AdapterSettings:
    """One rank, alpha and kind of scale for all modules: the largest rank, and the scale that most of them have."""
    names = [module.name for module in modules]
    ranks = {module_rank(config, name) for name in names}
    rank, alpha = max(ranks), common_alpha(config, names)
    if len(ranks) > 1 or alpha is None:
        scale = Counter(module_scale(config, name) for name in names).most_common(1)[0][0]
        alpha = scale * (math.sqrt(rank) if config.rslora else rank)
    adapted = {module.linear for module in modules}
    return AdapterSettings(rank, alpha, config.rslora, tuple(name for name in LINEARS if name in adapted))


def _check_shape(entries: Mapping[str, Entry], key: str, shape: tuple[int, int]) -> None:
    entry = entries[key]
    if entry.shape != shape:
        raise InputError(
            f"{entry.path}: tensor {key} has shape {list(entry.shape)}, expected {list(shape)}; choose the base that "
            f"the adapter was trained on, and check the ranks in {CONFIG_FILE}"
        )


def _read(entries: Mapping[str, Entry], key: str) -> np.ndarray:
    """One tensor, float32."""
    entry = entries[key]
    values = read_part(entry, key, whole(entry.shape)).astype(np.float32)
    if not np.isfinite(values).all():
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise InputError(f"{entry.path}: tensor {key} holds {values[tuple(place)]} at {place}; expected finite numbers")
    return values


def _check_adapters(adapters: Adapters, spec: ModelSpec) -> int:
    """R of the adapters, after checking that they fit the model."""
    shapes = linear_shapes(spec)
    rank = next(iter(adapters.lora_a.values())).shape[1] if adapters.lora_a else 0
    for name, half_a in adapters.lora_a.items():
        half_b = adapters.lora_b[name]
        out_dim, in_dim = shapes[name]
        if half_a.shape != (spec.num_layers, rank, in_dim) or half_b.shape != (spec.num_layers, out_dim, rank):
            raise InputError(
                f"adapters: {name} is {list(half_a.shape)} and {list(half_b.shape)}, expected "
                f"{[spec.num_layers, rank, in_dim]} and {[spec.num_layers, out_dim, rank]}; pass the model's spec"
            )
    if not rank:
        raise InputError("adapters: there are none to save")
    return rank


def _module_name(linear: str, layer: int, has_head: bool = True) -> str:
    part = "self_attn" if linear in _ATTENTION else "mlp"
    return f"{'model.' if has_head else ''}layers.{layer}.{part}.{linear}"


def _embedding(has_head: bool) -> str:
    return "model.embed_tokens" if has_head else "embed_tokens"
