"""The model card of an export: README.md in Markdown, with the metadata that the Hub reads.

It contains nothing that differs between two runs with the same settings: no seconds, no folder, no date.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from efx_jax.analysis.record import RunRecord
from efx_jax.analysis.wording import (
    base_name,
    base_on_hub,
    data_on_hub,
    domain,
    expert,
    expert_name,
    is_trained,
    known_limits,
    learned,
    measured,
    method,
    pattern,
    scored_rows,
    share_gone,
    text_name,
    trained,
    value_text,
)
from efx_jax.config import Config
from efx_jax.data.catalogue import OFFICIAL
from efx_jax.data.frames import apply_format
from efx_jax.data.prompts import Example
from efx_jax.data.sources import prompt_patterns
from efx_jax.evaluation.results import markdown_table

NAME = "README.md"
_TO_FILL_IN = "to-be-filled-in"
_LICENCE = (
    "The licence, by whoever publishes this model, in the metadata above as well (`license`): it follows from the "
    "licences of the base model and of the data."
)
_BASE = "The base model: its name on the Hub is not known here; add it to the metadata as `base_model`."


def card_text(record: RunRecord) -> str:
    """The whole file: metadata between lines of dashes, then Markdown."""
    config, summary = record.config, record.summary
    metadata = yaml.safe_dump(card_metadata(record), sort_keys=False, allow_unicode=True, width=120)
    parts = [
        f"# {_plain(expert_name(config))}",
        _about(record),
        "## Results",
        _results(summary["results"]),
        "## Load it",
        _loading(record),
        "## Training",
        _training(record),
        "## Limits",
        "\n".join(f"- {told}" for told in _limits(record)),
        "## To be filled in",
        _LICENCE,
        *([] if base_on_hub(config) else [_BASE]),
    ]
    return f"---\n{metadata}---\n\n" + "\n\n".join(parts) + "\n"


def card_metadata(record: RunRecord) -> dict[str, Any]:
    """What the Hub reads; keys without a known value are left out, and the licence is a placeholder."""
    config, summary = record.config, record.summary
    base = base_on_hub(config)
    names = _learned_tasks(config, summary)
    datasets = _datasets_on_hub(config, names)
    sparse = [f"sparsity-{100 * config.prune.sparsity:.4g}", "pruning"] if config.prune.sparsity else []
    found: dict[str, Any] = {
        **({"base_model": base.repository, "base_model_relation": "finetune"} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": _TO_FILL_IN,
        # The language of these tasks and of the ICD-10 codes.
        **({"language": ["en"]} if names and all(name in {*OFFICIAL, "icd10"} for name in names) else {}),
        "tags": ["efx_jax", "lora", *sparse, _plain(domain(config))],
        **({"datasets": datasets} if datasets else {}),
    }
    index = _model_index(record)
    return found | ({"model-index": [{"name": _plain(expert_name(config)), "results": index}]} if index else {})


def _about(record: RunRecord) -> str:
    config, summary = record.config, record.summary
    gone = f"{100 * share_gone(config, summary):.2f} %"
    if not config.prune.sparsity:
        zeros = "No weight is pruned."
    elif "cut" in summary:
        zeros = f"{gone} of the weights of its linear layers are cut out: {pattern(config)}."
    else:
        zeros = f"{gone} of the weights of {', '.join(f'`{name}`' for name in config.prune.targets)} are exact zeros "
        zeros += f"({pattern(config)}), stored as a dense checkpoint that every loader opens."
    facts = [
        ["base model", str(base_on_hub(config) or _plain(base_name(config)))],
        ["domain", _plain(domain(config))],
        ["sparsity", f"{gone}, {pattern(config)}"],
        ["learned from", _plain(learned(config, summary))],
    ]
    told = (
        f"{_plain(base_name(config))}, {'fine-tuned on' if is_trained(summary) else 'pruned for'} "
        f"{_plain(domain(config))} with "
        "[EfficientXpert](https://arxiv.org/abs/2511.19935) in JAX (efx_jax)."
    )
    return f"{told} {zeros}\n\n{markdown_table(['', ''], facts)}"


def _results(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = measured(results)
    if not rows:
        return "Nothing was measured."
    models = list(results)
    has_constant = any(row.constant is not None for row in rows)
    header = ["metric", *models, *(["best constant answer"] if has_constant else [])]
    lines = [
        [
            _plain(row.title),
            *(" ".join(filter(None, value_text(row, model))) or "-" for model in models),
            *(["-" if row.constant is None else f"{100 * row.constant:.1f}"] if has_constant else []),
        ]
        for row in rows
    ]
    return f"{markdown_table(header, lines)}\n\nValue [95 % bootstrap interval]."


def _loading(record: RunRecord) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
        "```\n\n"
        'In JAX: `params, spec = efx_jax.load_pretrained("THIS_FOLDER")`.\n\n'
        f"{_framing(record)}"
    )


def _framing(record: RunRecord) -> str:
    """How a prompt must be written, with the text that training put around it."""
    style, found = record.config.data.format, record.summary["data"]
    # Older summaries do not contain it.
    patterns = found["prompts"] if "prompts" in found else prompt_patterns(record.config.data)
    if not patterns:
        return "It has learned from text alone: there is no form that a prompt has to have."
    bare = {
        name: Example(pattern["prompt"], "-", instruction=pattern["instruction"]) for name, pattern in patterns.items()
    }
    if style == "chat":
        turn = 'tokenizer.apply_chat_template([{"role": "user", "content": prompt}]'
        options = "add_generation_prompt=True, enable_thinking=False"
        told = (
            "Prompts are user turns of the chat template, as in training, behind whatever system prompt and turns came "
            f"before: `{turn}, {options})`, where `prompt` is"
        )
        shown = {name: "\n\n".join(filter(None, (each.instruction, each.prompt))) for name, each in bare.items()}
    else:
        told = "Prompts are written as in training, nothing before or behind"
        framed = apply_format(list(bare.values()), style)
        shown = {name: each.prompt for name, each in zip(bare, framed, strict=True)}
    titles = {name: f"{_plain(name)}:\n\n" if len(shown) > 1 else "" for name in shown}
    blocks = [titles[name] + _fenced(prompt) for name, prompt in shown.items()]
    return "\n\n".join([f"{told} (braces stand for what a row fills in):", *blocks])


def _fenced(code: str) -> str:
    """A fenced code block whose fence does not occur in its text."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{code}\n{fence}"


def _training(record: RunRecord) -> str:
    config, summary = record.config, record.summary
    train = config.train
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    facts = [
        ["method", _plain(method(config, summary))],
        ["training", trained(summary)],
        ["optimisation", f"AdamW, learning rate {train.learning_rate:g} ({train.schedule}), {train.batch_size} rows"],
        ["versions", versions],
    ]
    return markdown_table(["", ""], facts)


def _limits(record: RunRecord) -> list[str]:
    scored = scored_rows(record.config, record.summary)
    told = _plain("; ".join(scored)) if scored else "nothing"
    return [f"It was evaluated only on this: {told}.", *known_limits(record.config, record.summary)]


def _learned_tasks(config: Config, summary: Mapping[str, Any]) -> list[str]:
    tasks = summary["data"]["train"].get("tasks", {})
    return list(tasks) if tasks else [config.data.train.partition(":")[0]]


def _datasets_on_hub(config: Config, names: list[str]) -> list[str]:
    tables = [split.hub for name in names if name in OFFICIAL for split in OFFICIAL[name].splits.values()]
    own = data_on_hub(config)
    # JSON-lines files are read through a table named "json".
    found = [table.name for table in tables if table is not None and "/" in table.name]
    return list(dict.fromkeys([*found, *([own.repository] if own else [])]))


def _model_index(record: RunRecord) -> list[dict[str, Any]]:
    """The exported model's results in the Hub's model-index format; shares, not percentages."""
    results = record.summary["results"]
    model = expert(results) if results else ""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in measured(results):
        value = row.values.get(model, (None, None, None))[0]
        if value is not None and math.isfinite(value):
            by_task.setdefault(row.task, []).append({"type": row.metric.lower(), "value": round(value, 4)})
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": _measured_on(task, record),
            "metrics": metrics,
        }
        for task, metrics in by_task.items()
    ]


def _measured_on(task: str, record: RunRecord) -> dict[str, str]:
    """The data that a task's scores refer to; for perplexity (`task` is "") the text, or rows that the run held out."""
    text = text_name(record.config, record.summary)
    if task:
        kind, name = task, task
    elif text:
        kind, name = text.split(".")[0], text
    else:
        kind, name = domain(record.config), "held-out text"
    return {"type": _plain(kind), "name": _plain(name)}


def _plain(name: str) -> str:
    """A name on one line, without characters that Markdown or HTML would interpret."""
    return " ".join("".join(sign for sign in name if sign not in "<>[]`*\\|").split()) or "model"
