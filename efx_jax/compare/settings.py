"""What is compared, read from a YAML file."""

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from efx_jax.config import Config
from efx_jax.config_io import PRESETS, load_config, parse_settings, preset_settings, read_yaml
from efx_jax.config_values import describe, nearest, parse_value, replace_values, setting_types
from efx_jax.errors import InputError
from efx_jax.evaluation.protocols import ProtocolName
from efx_jax.evaluation.results import TITLES
from efx_jax.training.start import FREE_SECTIONS

Settings = Mapping[str, Any]
"""Values by dotted path, as `replace_values` takes them."""

RUN_METRICS = ("sparsity", "train_seconds", "event_seconds", "peak_memory_mib", "tokens")
"""Metrics that every run has without an evaluation."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """What every run is measured on; fields correspond to flags of `python -m efx_jax.evaluation` (`protocols` lists
    several values of --protocol), and its other flags keep the run's values. The file's key `texts` next to these is
    `Comparison.texts`."""

    tasks: tuple[str, ...] = ()
    """Names of tasks or mixes, or files of rows with `prompt` and `response`."""
    rows: int = 0
    """Test rows of every task; 0: all."""
    protocols: tuple[ProtocolName, ...] = ("likelihood",)
    """How answers are obtained; each protocol has its own table."""
    runs: int = 4
    """Runs of the protocol "sampled"."""
    text_tokens: int = 20000
    """Tokens of every perplexity text; 0: all."""
    window: int = 512
    """Tokens per perplexity window."""
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        x: an axis of the comparison, "method" or "schedule".
        y: a metric, see `efx_jax.compare.records.CellRecord`.
        kind: means over seeds as lines, bars or the cells of a heat map, or all seeds as points.
        only: by axis, "method" or "schedule", the values that are drawn; ignored for a row that has no value there.
    """

    x: str
    y: str
    kind: Literal["lines", "bars", "points", "heat_map"]
    only: Mapping[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A grid of runs.

    Attributes:
        name: the file's name.
        base: the settings that all runs share.
        seeds: the runs' seeds.
        methods: by name, settings that override the base and the axes.
        schedules: by name, settings that override the method.
        runs: the names of the schedules that each method runs on; () for a method that sets `prune.sparsity` to 0.
        axes: values of settings, all combined; they override the base, and the method overrides them.
        evaluate: what is measured.
        texts: perplexity texts by name.
        reference: the method that Rel.% refers to, one that does not prune, or "".
        figures: figures by name.
    """

    name: str
    base: Config
    seeds: tuple[int, ...]
    methods: Mapping[str, Settings]
    schedules: Mapping[str, Settings]
    runs: Mapping[str, tuple[str, ...]]
    axes: Mapping[str, tuple[Any, ...]]
    evaluate: Evaluate
    texts: Mapping[str, str]
    reference: str
    figures: Mapping[str, Drawing]


def read_comparison(path: Path) -> Comparison:
    """Reads a comparison; the keys are the attributes of `Comparison`, except `texts`, which is under `evaluate`.

    `base` is the path of a config, relative to the comparison's folder, or settings, which may name a `config` and a
    `preset` that they override. A method may also name a `preset` that its settings override. Without `runs` every
    method runs on every schedule.

    Raises:
        InputError: an unreadable file, an unknown key or name, a wrong type, or nothing to measure.
    """
    tree = read_yaml(path)
    if path.stem == "runs":
        raise InputError(f"{path}: its tables would stand in the folder of all runs; rename the file")
    keys = [field.name for field in dataclasses.fields(Comparison) if field.name not in ("name", "texts")]
    _refuse_unknown(tree, keys, f"{path}")
    base = _read_base(tree.get("base", {}), path)
    methods = _read_named(tree, "methods", path)
    schedules = _read_named(tree, "schedules", path)
    if not methods:
        raise InputError(f"{path}: methods: expected at least one, found none; name it and what it changes")
    evaluate, texts = _read_evaluate(_mapping(tree.get("evaluate", {}), f"{path}: evaluate"), path)
    runs = _read_runs(tree.get("runs"), methods, schedules, path)
    reference = _text(tree.get("reference", ""), f"{path}: reference")
    if reference and runs.get(reference) != ():
        dense = ", ".join(name for name, chosen in runs.items() if not chosen) or "none"
        raise InputError(f"{path}: reference: expected a method that prunes nothing ({dense}), found {reference}")
    comparison = Comparison(
        name=path.stem,
        base=base,
        seeds=_different(_parse(tree.get("seeds", "0"), tuple[int, ...], f"{path}: seeds"), path, "seeds"),
        methods=methods,
        schedules=schedules,
        runs=runs,
        axes=_read_axes(_mapping(tree.get("axes", {}), f"{path}: axes"), path),
        evaluate=evaluate,
        texts=texts,
        reference=reference,
        figures={},
    )
    return dataclasses.replace(comparison, figures=_read_figures(tree.get("figures", {}), comparison, path))


def _read_base(node: Any, path: Path) -> Config:
    where = f"{path}: base"
    tree = {"config": node} if isinstance(node, str) and node else _mapping(node, where)
    file = _text(tree.pop("config", ""), f"{where}: config")
    preset = _text(tree.pop("preset", ""), f"{where}: preset")
    base = load_config(path.parent / file if file else None, preset or None)
    return replace_values(base, parse_settings(tree, where))


def _read_named(tree: Mapping[str, Any], key: str, path: Path) -> dict[str, Settings]:
    """Settings by name; a method's settings override those of the preset that it may name."""
    found = _mapping(tree.get(key, {}), f"{path}: {key}")
    _refuse_names(found, f"{path}: {key}")
    named: dict[str, Settings] = {}
    for name, node in found.items():
        where = f"{path}: {key}: {name}"
        settings = _mapping(node, where)
        if "seed" in settings:
            raise InputError(f"{where}: seed: expected no seed of its own, found {settings['seed']}; set seeds for all")
        preset = settings.pop("preset", "") if key == "methods" else ""
        _refuse_unknown([_text(preset, f"{where}: preset")] if preset else [], PRESETS, f"{where}: preset")
        named[name] = (preset_settings(preset) if preset else {}) | parse_settings(settings, where)
    return named


def _read_runs(
    node: Any, methods: Mapping[str, Settings], schedules: Mapping[str, Settings], path: Path
) -> dict[str, tuple[str, ...]]:
    where = f"{path}: runs"
    given = {method: list(schedules) for method in methods} if node is None else _mapping(node, where)
    _refuse_unknown(given, methods, where)
    runs = {}
    for method, names in given.items():
        is_dense = methods[method].get("prune.sparsity") == 0
        chosen = [_text(name, f"{where}: {method}") for name in _list(names) if name]
        _refuse_unknown(chosen, schedules, f"{where}: {method}")
        if is_dense and chosen and node is not None:
            raise InputError(f"{where}: {method} prunes nothing, so it has no schedule, found {', '.join(chosen)}")
        if not is_dense and not chosen:
            raise InputError(f"{where}: {method}: expected at least one schedule, found none; name one of schedules")
        runs[method] = () if is_dense else _different(tuple(chosen), path, f"runs: {method}")
    return runs


def _read_axes(tree: Mapping[str, Any], path: Path) -> dict[str, tuple[Any, ...]]:
    kinds = setting_types()
    axes = {}
    for key, values in tree.items():
        where = f"{path}: axes: {key}"
        known = [name for name in kinds if name != "seed" and name.partition(".")[0] not in FREE_SECTIONS]
        if key not in known:
            raise InputError(f"{where} is not a setting to vary; the nearest is {nearest(key, known)}")
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: expected a list of values, found {values!r}")
        parsed = tuple(_parse(value, kinds[key], where) for value in values)
        axes[key] = _different(parsed, path, f"axes: {key}")
    return axes


def _read_evaluate(tree: dict[str, Any], path: Path) -> tuple[Evaluate, dict[str, str]]:
    where = f"{path}: evaluate"
    kinds = typing.get_type_hints(Evaluate)
    found = _mapping(tree.pop("texts", {}), f"{where}: texts")
    _refuse_names(found, f"{where}: texts")
    texts = {name: _text(source, f"{where}: texts: {name}") for name, source in found.items()}
    _refuse_unknown(tree, [*kinds, "texts"], where)
    values = {name: _parse(node, kinds[name], f"{where}: {name}") for name, node in tree.items()}
    evaluate = Evaluate(**values)
    for name, least in (("rows", 0), ("runs", 1), ("text_tokens", 0), ("window", 2), ("batch_size", 1)):
        if values.get(name, least) < least:
            raise InputError(f"{where}: {name} must be at least {least}, found {values[name]}")
    if not (evaluate.tasks and evaluate.protocols) and not texts:
        raise InputError(f"{where}: expected tasks or texts to measure, found neither")
    return dataclasses.replace(evaluate, protocols=_different(evaluate.protocols, path, "evaluate: protocols")), texts


def _read_figures(node: Any, comparison: Comparison, path: Path) -> dict[str, Drawing]:
    tree = _mapping(node, f"{path}: figures")
    _refuse_names(tree, f"{path}: figures")
    known = [*comparison.axes, "method", "schedule"]
    figures = {}
    for name, found in tree.items():
        where = f"{path}: figures: {name}"
        values = _mapping(found, where)
        _refuse_unknown(values, ["x", "y", "kind", "only"], where)
        for key in ("x", "y", "kind"):
            if key not in values:
                raise InputError(f"{where}: expected x, y and kind, found no {key}")
        x, y = _text(values["x"], f"{where}: x"), _text(values["y"], f"{where}: y")
        _refuse_unknown([x], known, f"{where}: x")
        _check_metric(comparison, y, f"{where}: y")
        kind = _parse(values["kind"], typing.get_type_hints(Drawing)["kind"], f"{where}: kind")
        only = _mapping(values.get("only", {}), f"{where}: only")
        _refuse_unknown(only, known, f"{where}: only")
        chosen = {key: _read_chosen(comparison, key, value, f"{where}: only: {key}") for key, value in only.items()}
        figures[name] = Drawing(x, y, kind, chosen)
    return figures


def _check_metric(comparison: Comparison, metric: str, where: str) -> None:
    """Refuses a metric that no run will have; task names are known only once the tasks are loaded."""
    protocols = comparison.evaluate.protocols if comparison.evaluate.tasks else ()
    known = [*RUN_METRICS, *(f"perplexity.{name}" for name in comparison.texts)]
    known += [f"{name}.relative" for name in protocols if comparison.reference]
    protocol, _, rest = metric.partition(".")
    task, _, kind = rest.rpartition(".")
    if metric not in known and not (protocol in protocols and task and kind in TITLES):
        tasks = f", or PROTOCOL.TASK.METRIC with one of {', '.join(TITLES)}" if protocols else ""
        raise InputError(f"{where}: {metric} is not measured here; expected one of {', '.join(known)}{tasks}")


def _read_chosen(comparison: Comparison, key: str, node: Any, where: str) -> tuple[Any, ...]:
    if key in comparison.axes:
        kind, known = setting_types()[key], list(comparison.axes[key])
        chosen = [_parse(value, kind, where) for value in _list(node)]
    else:
        known = list(comparison.runs if key == "method" else comparison.schedules)
        chosen = [_text(value, where) for value in _list(node)]
    for value in chosen:
        if value not in known:
            raise InputError(f"{where}: expected some of {', '.join(map(str, known))}, found {value}")
    return tuple(chosen)


def _parse(node: Any, kind: Any, where: str) -> Any:
    texts = _list(node)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} must be {describe(kind)}, found {str(node)[:40]!r}")
    return parse_value(where, texts, kind)


def _refuse_names(names: Iterable[str], where: str) -> None:
    """Refuses names that cannot be part of a file name or of METHOD/SCHEDULE."""
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(f"{where}: expected names of letters, digits and _.+-, found {name!r}; rename it")


def _refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            hint = f"; the nearest is {nearest(name, known)}" if known else ""
            raise InputError(f"{where}: {name} is not known{hint}; expected one of {', '.join(known) or 'none'}")


def _different(values: tuple[Any, ...], path: Path, key: str) -> tuple[Any, ...]:
    if not values or len(set(values)) < len(values):
        raise InputError(f"{path}: {key}: expected different values, found {', '.join(map(str, values)) or 'none'}")
    return values


def _mapping(node: Any, where: str) -> dict[str, Any]:
    if node == "":
        return {}
    if not isinstance(node, dict):
        raise InputError(f"{where}: expected keys with values below it, found {str(node)[:40]!r}")
    return dict(node)


def _list(node: Any) -> list[Any]:
    return node if isinstance(node, list) else [node]


def _text(node: Any, where: str) -> str:
    if not isinstance(node, str):
        raise InputError(f"{where}: expected one text, found {str(node)[:40]!r}")
    return node
