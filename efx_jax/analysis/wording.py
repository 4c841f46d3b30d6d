"""A run described in words, for its report and its model card. Plain text, without local paths."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from efx_jax.config import Config
from efx_jax.config_values import setting_types
from efx_jax.evaluation.results import TITLES
from efx_jax.hub_name import HubName, hub_name
from efx_jax.weights.fetch import QUICKSTART, QUICKSTART_ON_HUB

_FILE_SUFFIXES = (".gguf", ".yaml", ".yml", ".jsonl", ".json", ".csv", ".parquet", ".gz")
_SCATTERED = (
    "Dense runtimes (transformers, vLLM, llama.cpp, XLA) gain neither speed nor memory from scattered zeros: they "
    "multiply them like any other number. A packed file is smaller."
)
_LIMITS = (
    "What the model was not scored on, nobody has measured: other domains, other languages, longer texts and safety "
    "may have become worse, also against its base.",
    "It inherits the base model's licence, biases and errors, and those of the data it has learned from.",
    "It is the outcome of research and no basis for medical, legal or other decisions about people.",
)
_SCORES = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "ria": "RIA",
    "foresight": "ForeSight",
    "foresight_gated": "ForeSight with the activation function",
    "foresight_loss": "ForeSight through to the loss",
    "sparsegpt": "SparseGPT",
    "lora_gradient": "the adapters' gradient",
    "dpruner": "D-Pruner",
    "atp": "ATP",
}
_RECOVERIES = {
    "none": "no repair",
    "pbs": "Partial Brain Surgeon",
    "gram_pbs": "Partial Brain Surgeon with the full Gram matrix",
    "admm": "kept weights refitted by ADMM",
    "obs": "SparseGPT's update of the kept weights",
}
_BUDGETS = {
    "uniform": "",
    "owl": ", layers with more outliers losing less (OWL)",
    "global": ", by one threshold for all matrices",
}
_GROUPS = {
    "row": "unstructured, every row alike",
    "matrix": "unstructured, over whole matrices",
    "slab": "unstructured, over slabs of 128 inputs",
}


Value = tuple[float | None, tuple[float, float] | None, float | None]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A metric of every model: (value, interval, deviation over runs), each None if it is missing.

    `in_percent`: the values are shares. `constant`: the score of the best constant answer.
    """

    task: str
    metric: str
    title: str
    in_percent: bool
    values: Mapping[str, Value]
    constant: float | None = None


def base_name(config: Config) -> str:
    """The base model's own name, without folders and revision."""
    base = base_on_hub(config)
    path = config.model.path if base is None else base.repository
    return PurePath(path).name.removesuffix(".gguf") or "base model"


def base_on_hub(config: Config) -> HubName | None:
    """The base's name on the Hub, if it was given by that name; local paths are kept private."""
    return QUICKSTART_ON_HUB if config.model.path == QUICKSTART else name_on_hub(config.model.path)


def data_on_hub(config: Config) -> HubName | None:
    """The data set of the training rows, without its configuration and split; None for a file, a task or a mix."""
    return name_on_hub(config.data.train.partition(":")[0])


def name_on_hub(text: str) -> HubName | None:
    """A Hub name with an owner, unless it is a path: one that exists locally, or that has a file suffix."""
    name = hub_name(text)
    if name is None or not name.has_owner or text.endswith(_FILE_SUFFIXES) or Path(text).exists():
        return None
    return name


def domain(config: Config) -> str:
    """What the model was trained on, by its short name."""
    table = data_on_hub(config)
    return PurePath(config.data.train if table is None else table.repository).name.split(".")[0] or "own data"


def expert_name(config: Config) -> str:
    """A title for the exported model."""
    kind = f"{_percent(config.prune.sparsity)} sparse" if config.prune.sparsity else "dense"
    return f"{base_name(config)}, {kind} {domain(config)} expert"


def pattern(config: Config) -> str:
    """Which weights are zero, as a clause."""
    prune = config.prune
    if not prune.sparsity:
        return "nothing pruned"
    if prune.score == "atp":
        return "structured: whole heads and hidden units cut out"
    if ":" in prune.group:
        keep, of = prune.group.split(":")
        return f"semi-structured {prune.group}: {keep} of {of} consecutive inputs are kept"
    return _GROUPS.get(prune.group, f"unstructured, every row within {_percent(prune.bound)} of its matrix")


def is_trained(summary: Mapping[str, Any]) -> bool:
    """Whether the run has made any updates."""
    return bool(summary["steps"])


def method(config: Config, summary: Mapping[str, Any]) -> str:
    """How the pruned weights were chosen and compensated for, as a sentence."""
    prune, lora = config.prune, config.lora
    adapters = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}" if is_trained(summary) else "no training"
    if not prune.sparsity:
        return f"{adapters}; nothing pruned."
    if prune.score == "atp":
        return f"{adapters}; units chosen by ATP while training."
    events = {
        "epochs": "an event after every epoch",
        "fractions": f"events at {', '.join(_percent(share) for share in prune.fractions)} of training"
        if is_trained(summary)
        else "a single event",
        "cubic": f"{prune.events} events on a cubic ramp",
    }[prune.schedule]
    refitted = ", A too" if prune.pbs_rounds else ""
    swapped = ", exact swaps within rows" if prune.swaps else ""
    moved = ", units first brought into an order that suits the pattern" if prune.permute else ""
    refined = ", which chooses the mask again" if prune.recovery == "admm" and prune.admm_refine else ""
    training = f"; mask in training: {prune.mask_forward}{_taught(config, summary)}" if is_trained(summary) else ""
    return (
        f"{adapters}; entries chosen by {_SCORES[prune.score]}{_BUDGETS[prune.budget]}{swapped}{moved}; {events}; "
        f"{_RECOVERIES[prune.recovery]}{refitted}{refined}{training}."
    )


def _taught(config: Config, summary: Mapping[str, Any]) -> str:
    """The teacher of the pruned model, if any, and on which text, as a clause; older summaries do not record it."""
    found = summary.get("taught", {"teacher": bool(config.distill.teacher), "text_rows": 1})
    text = f" and on text of {PurePath(config.distill.text).name}" if config.distill.text and found["text_rows"] else ""
    return f"; taught by {_teacher(config)} where rows have no labels{text}" if found["teacher"] else ""


def _teacher(config: Config) -> str:
    return "the base" if config.distill.teacher == "base" else PurePath(config.distill.teacher).name


def text_name(config: Config, summary: Mapping[str, Any]) -> str:
    """The short name of the text that perplexity was measured on; "" if rows were held out for it."""
    # Older summaries do not record the text that came with a mix or a task.
    return PurePath(summary["data"].get("text", config.data.text)).name


def known_limits(config: Config, summary: Mapping[str, Any]) -> tuple[str, ...]:
    """What the exported model does not do, a sentence or two each."""
    is_scattered = config.prune.sparsity and "cut" not in summary
    return (_SCATTERED, *_LIMITS) if is_scattered else _LIMITS


def learned(config: Config, summary: Mapping[str, Any]) -> str:
    """What the model was trained on, with the number of rows."""
    rows = summary["data"]["train"]
    counts = {name: found.get("drawn") for name, found in rows.get("tasks", {}).items()}
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count is not None)
    return f"{domain(config)}: {rows['rows']:,} rows" + (f" ({parts})" if parts else "")


def trained(summary: Mapping[str, Any]) -> str:
    """How long the exported model, which need not be the last one, was trained."""
    best = summary.get("best") or {}
    tokens = best.get("tokens") or summary["tokens"]
    return f"{summary['steps']:,} updates, {tokens:,} tokens, seed {summary['seed']}"


def share_gone(config: Config, summary: Mapping[str, Any]) -> float:
    """Share of the weights of the pruned matrices that are zero or were cut out."""
    if "cut" in summary:
        return float(summary["cut"]["removed"])
    entries = summary["entries"]
    names = [name for name in config.prune.targets if summary["sparsity"].get(name)]
    if not names:
        return 0.0
    zeros = sum(entries[name] * sum(summary["sparsity"][name]) for name in names)
    return zeros / sum(entries[name] * len(summary["sparsity"][name]) for name in names)


def changed_settings(config: Config) -> list[tuple[str, str, str]]:
    """(name, value, default) of every setting that is not at its default."""
    default = Config()
    found = []
    for name in setting_types():
        value, usual = setting_value(config, name), setting_value(default, name)
        if value != usual:
            found.append((name, _written(value), _written(usual)))
    return found


def measured(results: Mapping[str, Mapping[str, Any]]) -> list[Measured]:
    """A row per metric: perplexity, then those of every task, in the order of `TITLES`."""
    rows = []
    if any("perplexity" in found for found in results.values()):
        texts = {model: found["perplexity"] for model, found in results.items() if "perplexity" in found}
        values: dict[str, Value] = {m: (found["value"], _ends(found["interval"]), None) for m, found in texts.items()}
        rows.append(Measured("", "perplexity", "perplexity (lower is better)", False, values))
    tasks = {name: task for found in results.values() for name, task in found.get("tasks", {}).items()}
    for task, example in tasks.items():
        of_task = {m: found["tasks"][task] for m, found in results.items() if task in found.get("tasks", {})}
        for metric in (metric for metric in TITLES if metric in example):
            values = {
                model: (found[metric], _ends(found[f"{metric}_interval"]), found.get(f"{metric}_std"))
                for model, found in of_task.items()
            }
            title = f"{task} {TITLES[metric]}"
            rows.append(Measured(task, metric, title, True, values, example.get(f"constant_{metric}")))
    return rows


def value_text(row: Measured, model: str) -> tuple[str, str]:
    """A metric of a model for a table: the value with its deviation, and the interval; "" if it was not measured."""
    if model not in row.values:
        return "", ""
    value, ends, deviation = row.values[model]
    if value is None:
        return "not finite", ""
    scale = 100 if row.in_percent else 1
    digits = 1 if row.in_percent else 2
    spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    interval = "" if ends is None else f"[{scale * ends[0]:,.{digits}f}, {scale * ends[1]:,.{digits}f}]"
    return f"{scale * value:,.{digits}f}{spread}", interval


def scored_rows(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """What the models were scored on: a clause per task and one for the text."""
    results = summary["results"]
    last = list(results.values())[-1] if results else {}
    told = [
        f"{name}: {task['rows']:,} rows, {_protocol(task)}" + (f" ({task['note']})" if task.get("note") else "")
        for name, task in last.get("tasks", {}).items()
    ]
    if "perplexity" in last:
        told.append(
            f"perplexity: {last['perplexity']['tokens']:,} tokens of {text_name(config, summary) or 'held-out text'}"
        )
    return told


def expert(results: Mapping[str, Any]) -> str:
    """The name under which the exported model's results are stored."""
    return next((name for name in ("sparse expert", "dense expert") if name in results), list(results)[-1])


def dense(results: Mapping[str, Any]) -> str:
    """The dense model to compare with: the dense adapter before the event, if it was measured, or the one that the run
    began with; else the base."""
    found = next((name for name in results if name.startswith("dense LoRA")), "base with adapter")
    return found if found in results else "base"


def _protocol(task: Mapping[str, Any]) -> str:
    runs = f", mean of {task['runs']} runs" if task.get("runs", 1) > 1 else ""
    return {
        "likelihood": "the likeliest answer",
        "greedy": "read from greedily generated text",
        "sampled": "read from sampled text",
    }.get(task.get("protocol", ""), "scored") + runs


def _ends(interval: Any) -> tuple[float, float] | None:
    if not interval or any(end is None for end in interval):
        return None
    return float(interval[0]), float(interval[1])


def setting_value(config: Config, name: str) -> Any:
    """The value of a setting by its name, such as "prune.sparsity" or "seed"."""
    section, _, field = name.partition(".")
    value = getattr(config, section)
    return getattr(value, field) if field else value


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return '""' if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
