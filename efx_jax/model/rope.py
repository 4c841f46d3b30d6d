"""Rotary embedding: a model's variant, read from its `config.json` and written back."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from efx_jax.errors import InputError

_DEFAULT_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. `original_max_position` is the context length before scaling, in tokens."""

    rope_type: str = "default"
    theta: float = _DEFAULT_THETA
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_YARN_NUMBERS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
_YARN_OPTIONAL = (*_YARN_NUMBERS, "truncate")


def rope_from_config(config: Mapping[str, Any], max_positions: int) -> RopeSpec:
    """Reads `rope_scaling` and `rope_theta` (old schema) or `rope_parameters` (new).

    Args:
        config: raw JSON of a `config.json`.
        max_positions: the model's context length in tokens.

    Raises:
        InputError: an unsupported kind of rope, or one with a missing or invalid field.
    """
    # If a config.json holds both, transformers uses the older key.
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        raise InputError(
            f"config.json: rope_parameters must be one object for all layers, found {parameters!r}; "
            "several kinds of rope in one model are not supported"
        )
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_FIELDS:
        raise InputError(
            f"config.json: rope_type {rope_type!r} is not supported; expected one of {', '.join(_ROPE_FIELDS)}"
        )
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise InputError(f"config.json: partial_rotary_factor {partial} is not supported; expected 1.0")
    # rope_theta is at the top level in the old schema, inside rope_parameters in the new one.
    theta = positive_number(parameters, "rope_theta", positive_number(config, "rope_theta", _DEFAULT_THETA))
    name = "original_max_position_embeddings"
    outer, inner = (positive_number(each, name, 0.0) for each in (config, parameters))
    if outer and inner and outer != inner and rope_type in ("llama3", "yarn"):
        raise InputError(
            f"config.json: {name} is {outer:g}, and {inner:g} inside the rope parameters; versions of transformers "
            "differ in which they take; remove the wrong one"
        )
    original = inner or outer or max_positions
    # If the factor is null, transformers uses the one implied by the two context lengths.
    implied = {"factor": max_positions / original} if rope_type == "yarn" else {}
    given = {name for name in parameters if parameters[name] is not None or name in implied}
    missing = [name for name in _ROPE_FIELDS[rope_type] if name not in given]
    if missing:
        raise InputError(f"config.json: rope_type {rope_type!r} needs {', '.join(missing)} in rope_parameters")
    factor = positive_number(parameters, "factor", implied.get("factor", 1.0))
    fields: dict[str, Any] = {}
    if rope_type == "yarn":
        fields = _yarn_fields(parameters)
    if rope_type == "llama3":
        fields = {name: positive_number(parameters, name, 1.0) for name in ("low_freq_factor", "high_freq_factor")}
    return RopeSpec(
        rope_type=rope_type,
        theta=theta,
        factor=factor,
        original_max_position=int(original),
        **fields,
    )


def _yarn_fields(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of YaRN's options that are given."""
    # transformers treats an mscale of 0 as absent.
    given = [
        name
        for name in _YARN_NUMBERS
        if parameters.get(name) is not None and not (name.startswith("mscale") and parameters[name] == 0)
    ]
    fields: dict[str, Any] = {name: positive_number(parameters, name, 1.0) for name in given}
    if "truncate" not in parameters:
        return fields
    # transformers treats null as false.
    truncate = False if parameters["truncate"] is None else parameters["truncate"]
    if not isinstance(truncate, bool):
        raise InputError(f"config.json: truncate must be true, false or null, found {truncate!r}")
    return fields | {"truncate": truncate}


def positive_number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A number above 0 from a `config.json`, or the default if it is missing or null.

    Raises:
        InputError: anything else.
    """
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"config.json: {name} must be a number above 0, found {value!r}")
    return float(value)


def rope_to_config(rope: RopeSpec) -> dict[str, Any]:
    """The dictionary that goes under `rope_parameters` and `rope_scaling`, without theta."""
    parameters: dict[str, Any] = {"rope_type": rope.rope_type}
    if rope.rope_type == "default":
        return parameters
    parameters["factor"] = rope.factor
    if rope.rope_type in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_position
    if rope.rope_type == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.rope_type == "yarn":
        optional = {name: getattr(rope, name) for name in _YARN_OPTIONAL}
        parameters |= {name: value for name, value in optional.items() if value is not None}
    return parameters


def yarn_attention_factor(rope: RopeSpec) -> float:
    """The factor on cos and sin under YaRN (arXiv 2309.00071, section 3.4, and transformers' mscale variants)."""

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor)
