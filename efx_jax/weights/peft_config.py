"""Reads the `adapter_config.json` of a PEFT folder, checking all of its options, and writes one.

Meaning of the options: `LoraConfig` and `check_target_module_exists` of github.com/huggingface/peft (0.21). An option
that would change what the adapter computes, and is not implemented here, is refused by name, as is an unknown one.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efx_jax.errors import InputError
from efx_jax.hub_name import HubName, hub_name
from efx_jax.lora import lora_scale
from efx_jax.weights.config_json import read_json

CONFIG_FILE = "adapter_config.json"
# Options that are read here, and those that do not affect what a trained adapter computes.
_READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
)
_IDLE = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
_UNSET: tuple[Any, ...] = (None, False, "", "none", [], {})
# Initialisations of A and B that leave the base unchanged; all others (pissa, olora, corda, loftq, lora_ga) change it.
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

# The range of float32, in which adapters are computed.
_LARGEST = 3.4e38

Names = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an `adapter_config.json` says about the adapted modules.

    Attributes:
        path: the file, for messages.
        rank: r of a module that no pattern matches.
        alpha: lora_alpha of such a module.
        rslora: whether scales are alpha / sqrt(r).
        rank_pattern: regular expression for the end of a module's name -> its r.
        alpha_pattern: the same for lora_alpha.
        targets: names, a regular expression, or "all-linear".
        excluded: names or a regular expression; takes precedence over `targets`.
        layers: indices of the layers to which `targets` (as names) applies; None: all.
        layers_pattern: possible names of the list of layers.
    """

    path: Path
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: Names
    excluded: Names
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads the settings of a LoRA adapter.

    Raises:
        InputError: no such file, a method other than LoRA, an unsupported option, or a value of a type that PEFT does
            not write.
    """
    path = folder / CONFIG_FILE
    raw = read_json(path)
    _refuse_unsupported(path, raw)
    ranks, alphas = _pattern(path, raw, "rank_pattern"), _pattern(path, raw, "alpha_pattern")
    alpha = _positive(path, "lora_alpha", raw.get("lora_alpha", 8))
    return PeftConfig(
        path=path,
        rank=_positive_int(path, "r", raw.get("r", 8)),
        alpha=alpha,
        rslora=bool(raw.get("use_rslora")),
        rank_pattern={key: _positive_int(path, f"rank_pattern {key}", value) for key, value in ranks.items()},
        alpha_pattern={key: _positive(path, f"alpha_pattern {key}", value) for key, value in alphas.items()},
        targets=_targets(path, raw),
        excluded=_names(path, "exclude_modules", raw.get("exclude_modules") or ()),
        layers=_layers(path, raw.get("layers_to_transform")),
        layers_pattern=_layers_pattern(path, raw),
    )


def is_adapted(config: PeftConfig, module: str) -> bool:
    """Whether PEFT puts an adapter on a linear of that name, such as "model.layers.0.mlp.up_proj"."""
    if _is_named(config.excluded, module):
        return False
    if config.targets == "all-linear":
        # PEFT leaves out the head that gives the logits.
        return module != "lm_head" and not module.endswith("embed_tokens")
    if isinstance(config.targets, str) or config.layers is None:
        return _is_named(config.targets, module)
    return _is_named(config.targets, module) and _layer_of(module, config.layers_pattern) in config.layers


def module_rank(config: PeftConfig, module: str) -> int:
    """r of a module."""
    return _by_pattern(config.rank_pattern, module, config.rank)


def module_scale(config: PeftConfig, module: str) -> float:
    """The factor on B A of a module: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    alpha = _by_pattern(config.alpha_pattern, module, config.alpha)
    return lora_scale(module_rank(config, module), alpha, config.rslora)


def common_alpha(config: PeftConfig, modules: Sequence[str]) -> float | None:
    """lora_alpha of all the modules; None if they differ."""
    alphas = {_by_pattern(config.alpha_pattern, module, config.alpha) for module in modules}
    return alphas.pop() if len(alphas) == 1 else None


def peft_config_text(rank: int, alpha: float, rslora: bool, targets: Sequence[str], base: str) -> str:
    """The text of an `adapter_config.json` that PEFT loads.

    Args:
        rank: r of every module.
        alpha: lora_alpha.
        rslora: whether the scale is alpha / sqrt(r).
        targets: last parts of the names of the adapted modules; they are adapted in every layer.
        base: path or Hub name (`owner/name@revision` pins it) of the model that the adapter belongs to.
    """
    name = (None if Path(base).exists() else hub_name(base)) or HubName(base)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name.repository,
        "revision": name.revision or None,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": rslora,
        "target_modules": list(targets),
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
    }
    return json.dumps(config, indent=2) + "\n"


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: peft_type is {raw.get('peft_type')!r}, expected 'LORA'; merge that adapter with peft"
        )
    for name, value in raw.items():
        if name not in (*_READ, *_IDLE) and value not in _UNSET:
            raise InputError(
                f"{path}: option {name} = {json.dumps(value)[:60]} is not supported, and the adapter means something "
                "else without it; merge it into its base with peft (merge_and_unload), or train a plain LoRA"
            )
    start = raw.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        raise InputError(
            f"{path}: init_lora_weights {start!r} has moved the base weights too, so the adapter fits no other base; "
            "convert it to a plain LoRA with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _targets(path: Path, raw: Mapping[str, Any]) -> Names:
    found = raw.get("target_modules")
    if not found:
        raise InputError(
            f"{path}: target_modules is {found!r}, expected a list of names, a regular expression or all-linear"
        )
    targets = _names(path, "target_modules", found)
    return "all-linear" if isinstance(targets, str) and targets.lower() == "all-linear" else targets


def _names(path: Path, option: str, value: Any) -> Names:
    """A regular expression, or a list of names."""
    if isinstance(value, str):
        _check_expression(path, option, value)
        return value
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{path}: {option} is {value!r}, expected a list of names or a regular expression")
    return tuple(value)


def _layers(path: Path, value: Any) -> tuple[int, ...] | None:
    numbers = [value] if isinstance(value, int) else value
    if numbers in (None, []):
        return None
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        raise InputError(f"{path}: layers_to_transform is {value!r}, expected a number or a list of numbers")
    return tuple(numbers)


def _layers_pattern(path: Path, raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The expressions, which must have no groups: PEFT takes the first group for the layer index."""
    found = _names(path, "layers_pattern", raw.get("layers_pattern") or ())
    listed = (found,) if isinstance(found, str) else found
    for text in listed:
        _check_expression(path, "layers_pattern", text)
        if re.compile(text).groups:
            raise InputError(f"{path}: layers_pattern {text!r} has a group, which PEFT cannot read; name each list")
    return listed


def _pattern(path: Path, raw: Mapping[str, Any], option: str) -> dict[str, Any]:
    found = raw.get(option) or {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: {option} is {found!r}, expected names with numbers")
    for key in found:
        _check_expression(path, option, key)
    return found


def _check_expression(path: Path, option: str, text: str) -> None:
    try:
        # Inside a larger expression, as PEFT uses it: there, global flags such as (?i) are an error too.
        re.compile(rf"(.*\.)?({text})$" if option.endswith("_pattern") else text)
    except re.error as error:
        raise InputError(f"{path}: {option} {text!r} is no regular expression ({error})") from None


def _positive_int(path: Path, option: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path}: {option} is {value!r}, expected an integer of at least 1")
    return value


def _positive(path: Path, option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
        raise InputError(f"{path}: {option} is {value!r}, expected a number above 0 that float32 holds")
    return float(value)


def _is_named(names: Names, module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer_of(module: str, patterns: Sequence[str]) -> int | None:
    """The layer index in a module's name, by PEFT's rule: the number after the first list of layers."""
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for expression in expressions if (match := re.match(expression, module))), None)
    return None if found is None else int(found[1])


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first expression that matches the end of the module's name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
