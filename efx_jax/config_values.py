"""From text to a setting's value. A setting is named by its dotted path, such as `prune.sparsity`.

Flags and YAML files both pass text, so that they mean the same: YAML's own rules would read `group: 2:4` as the number
124 and `learning_rate: 1e-4` as a string.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from efx_jax.config import Config
from efx_jax.errors import InputError


def setting_types() -> dict[str, Any]:
    """The type of every setting by its dotted path, in the order of `Config`."""
    found: dict[str, Any] = {}
    for name, section in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(section):
            found |= {f"{name}.{field}": kind for field, kind in typing.get_type_hints(section).items()}
        else:
            found[name] = section
    return found


def parse_value(where: str, texts: Sequence[str], kind: Any) -> Any:
    """One setting's value from its texts.

    Args:
        where: the flag, or the file and key, for the error message.
        texts: one text; for a tuple any number, each of which may hold several values separated by commas.
        kind: the setting's type: str, int, float, bool, a Literal of strings, or a tuple of these.

    Raises:
        InputError: a text that is not of the kind, or a wrong number of texts.
    """
    if typing.get_origin(kind) is tuple:
        items = [item.strip() for text in texts for item in text.split(",") if item.strip()]
        item_kind, *rest = typing.get_args(kind)
        if rest != [Ellipsis] and len(items) != len(rest) + 1:
            raise InputError(f"{where} must be {describe(kind)}, found {len(items)}: {' '.join(items)}")
        return tuple(parse_value(where, [item], item_kind) for item in items)
    if len(texts) != 1:
        raise InputError(f"{where} must be {describe(kind)}, found {len(texts)} values: {' '.join(texts)}")
    try:
        return _convert(texts[0], kind)
    except ValueError:
        raise InputError(f"{where} must be {describe(kind)}, found {texts[0]!r}") from None


def _convert(text: str, kind: Any) -> Any:
    """Raises ValueError where the text is not of the kind."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return choices[choices.index(text)]
    if kind is bool:
        return bool(("false", "true").index(text.lower()))
    if kind is float and not math.isfinite(float(text)):
        raise ValueError
    return kind(text)


def describe(kind: Any) -> str:
    """What a setting of this type expects, in words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) is tuple:
        item_kind, *rest = typing.get_args(kind)
        count = "values" if rest == [Ellipsis] else f"{len(rest) + 1} values"
        return f"{count}, each {describe(item_kind)}"
    return {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}[kind]


def nearest(name: str, known: Iterable[str]) -> str:
    """The most similar known name; a bare field name, such as `sparsity`, finds its section."""

    def similarity(candidate: str) -> tuple[bool, float]:
        same_field = candidate.rpartition(".")[2] == name
        return same_field, difflib.SequenceMatcher(None, name, candidate).ratio()

    return max(known, key=similarity)


def replace_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The settings with those in `values`, by dotted path, replaced."""
    for key, value in values.items():
        name, _, field = key.rpartition(".")
        if name:
            section = dataclasses.replace(getattr(config, name), **{field: value})
            config = dataclasses.replace(config, **{name: section})
        else:
            config = dataclasses.replace(config, **{field: value})
    return config
