"""The sections of a run's report, each a pure function of what the run has left on disk."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from efx_jax.analysis.html import Html, code, element, fold, join, paragraph, section, table, text
from efx_jax.analysis.record import HELD_OUT, RunRecord
from efx_jax.analysis.svg import bar
from efx_jax.analysis.wording import (
    Measured,
    base_name,
    changed_settings,
    dense,
    expert,
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

_END, _LONG = 110, 60
Answer = Mapping[str, Any]


def asked(record: RunRecord) -> Html:
    """The settings that the run was given."""
    config, summary = record.config, record.summary
    facts = [
        ("base model", f"{base_name(config)} ({config.model.path})"),
        ("learned from", learned(config, summary)),
        ("sparsity", f"{100 * share_gone(config, summary):.2f} % of the pruned matrices; {pattern(config)}"),
        ("method", method(config, summary)),
        ("training", trained(summary)),
        *(("scored on", told) for told in scored_rows(config, summary)),
    ]
    changed = [
        [element("code", text(name)), text(value), text(usual)] for name, value, usual in changed_settings(config)
    ]
    caption = f"The {len(changed)} settings that are not at their default"
    settings = table(caption, ["setting", "value", "default"], changed, numbers=False)
    return section("asked", "What was asked", [_facts(facts), fold(text(caption), [settings])])


def results(record: RunRecord) -> Html:
    """Every metric of every model, with intervals."""
    found = record.summary["results"]
    rows = measured(found)
    if not rows:
        return section("results", "Results", [paragraph("Nothing was measured: the run had neither text nor tasks.")])
    groups: dict[str, list[Measured]] = {}
    for row in rows:
        groups.setdefault(row.task, []).append(row)
    name = text_name(record.config, record.summary) or "Held-out text"
    tables = [_result_table(task, task or name, of_task, list(found)) for task, of_task in groups.items()]
    told = "In brackets: the 95 % bootstrap interval over rows, or over groups of rows that share a text."
    parts = [element("div", join(tables, "\n"), {"class": "tables"}), paragraph(told, "soft")]
    best = record.summary.get("best")
    if best:
        chosen = f"Exported is the model of step {best['step']:,}, chosen by {best['metric']} {best['value']:.4g}."
        parts.append(paragraph(chosen))
    return section("results", "Results", parts)


def headline(record: RunRecord) -> Html:
    """How the main metrics changed from the dense model to the expert, in one line."""
    found = record.summary["results"]
    before, after = dense(found), expert(found)
    told = []
    for row in measured(found):
        first, last = value_text(row, before)[0], value_text(row, after)[0]
        if first and last and row.metric in ("perplexity", "accuracy", "rougeL"):
            unit = "\u00a0%" if row.in_percent else ""
            name = row.title.removesuffix(" (lower is better)").removesuffix(" %")
            told.append(f"{name} {first}{unit} → {last}{unit}")
    return paragraph(f"{before} → {after}: {'; '.join(told)}." if told else "Nothing was measured.", "lead")


def resources(record: RunRecord) -> Html:
    """Seconds and memory by phase."""
    seconds: dict[str, float] = record.summary["seconds"]
    memory: dict[str, float] = record.summary.get("memory_mib", {})
    total = sum(seconds.values())
    rows = [
        [text(name), text(_duration(spent)), _share(spent / max(total, 1e-9)), text(_mib(memory.get(name)))]
        for name, spent in seconds.items()
    ]
    rows.append([text("all"), text(_duration(total)), text("100 %"), text(_mib(record.summary["peak_memory_mib"]))])
    speeds = sorted(row["tokens_per_second"] for row in record.metrics if row.get("tokens_per_second"))
    facts = [
        ("device", str(record.summary.get("device", "unknown"))),
        *([("median speed", f"{speeds[len(speeds) // 2]:,.0f} tokens a second")] if speeds else []),
    ]
    shares = table("Time by phase, and the most memory until its end", ["phase", "time", "share", "memory, MiB"], rows)
    return section("resources", "Time and memory", [shares, _facts(facts)])


def samples(record: RunRecord) -> Html:
    """Answers of the dense and of the exported model next to the gold answer."""
    title = "Sample answers"
    models = _answering(record)
    shown = [sample for sample in record.samples if any(model in sample["answers"] for model in models)]
    if not shown:
        told = "No answers were kept: the run scores no task (data.test), or eval.samples is 0."
        return section("samples", title, [paragraph(told)])
    told = f"The first rows of every scored task, {len(shown)} in all; nobody has picked them."
    if all(sample["task"] == HELD_OUT for sample in shown):
        told = (
            f"What the models write behind the prompts of {len(shown)} rows that were held out; none of it is scored."
        )
    if models[-1] != "dense expert":
        missing = ", as no dense adapter was measured" if models[0] == "base" else ""
        told += f" The dense model here is “{models[0]}”{missing}."
    if any("margin" in answer for sample in shown for answer in sample["answers"].values()):
        told += " Margin: by how many nats the answer is likelier than the next one."
    counts = "; ".join(filter(None, (_right_text(shown, model) for model in models)))
    articles = [_sample(number, sample, models) for number, sample in enumerate(shown, start=1)]
    return section("samples", title, [paragraph(told), *([paragraph(counts)] if counts else []), *articles])


def loading(record: RunRecord) -> Html:
    """How to use the export."""
    folder = str(record.folder / "export")
    transformers = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"
    )
    own = (
        "import efx_jax\n\n"
        f"params, spec = efx_jax.load_pretrained({folder!r})\n"
        f"tokenizer = efx_jax.load_tokenizer({folder!r})"
    )
    # Without test rows or text, there is nothing that the evaluation command could measure by default.
    has_own = record.summary["data"]["test"] or text_name(record.config, record.summary)
    score = f"python -m efx_jax.evaluation {shlex.quote(str(record.folder))}{'' if has_own else ' --tasks FILE'}"
    told = "Score it again, or on other --tasks and --text:" if has_own else "Score it on rows of your own:"
    parts = [
        *(paragraph("With transformers:"), code(transformers)),
        *(paragraph("With efx_jax:"), code(own)),
        *(paragraph(told), code(score)),
    ]
    return section("loading", "Load the export", parts)


def origin(record: RunRecord) -> Html:
    """The command and the versions that produced the run."""
    summary = record.summary
    again = f"python train.py --config {shlex.quote(str(record.folder / 'config.yaml'))} --output NEW"
    parts = [
        *((paragraph("The command that finished it:"), code(summary["command"])) if summary.get("command") else ()),
        *(paragraph("The same run again:"), code(again)),
        _facts([*summary["versions"].items(), ("device", str(summary.get("device"))), ("seed", str(summary["seed"]))]),
    ]
    return section("origin", "How it was made", parts)


def limits(record: RunRecord) -> Html:
    """What the exported model does not do."""
    told = (element("li", text(limit)) for limit in known_limits(record.config, record.summary))
    return section("limits", "Limits", [element("ul", join(told, "\n"))])


def _facts(facts: Sequence[tuple[str, str]]) -> Html:
    pairs = (join([element("dt", text(name)), element("dd", text(told))]) for name, told in facts)
    return element("dl", join(pairs, "\n"), {"class": "facts"})


def _result_table(task: str, caption: str, rows: Sequence[Measured], models: Sequence[str]) -> Html:
    """A row per model, a column per metric, and the best constant answer if there is one."""
    lines = [
        [text(model), *(_value(row, model) for row in rows)]
        for model in models
        if any(model in row.values for row in rows)
    ]
    if any(row.constant is not None for row in rows):
        constants = (text("–" if row.constant is None else f"{100 * row.constant:.1f}") for row in rows)
        lines.append([text("best constant answer"), *constants])
    names = [row.title.removeprefix(f"{task} ") for row in rows]
    return table(caption, ["model", *names], lines)


def _value(row: Measured, model: str) -> Html:
    value, interval = value_text(row, model)
    below = element("span", text(interval), {"class": "interval"}) if interval else Html("")
    return join([text(value or "–"), below], " " if interval else "")


def _share(share: float) -> Html:
    return join([text(f"{100 * share:.0f} %"), bar(share)], " ")


def _mib(size: float | None) -> str:
    return "–" if size is None else f"{size:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{seconds / 3600:.1f} h"


def _answering(record: RunRecord) -> list[str]:
    """The dense and the exported model, among those whose answers were saved."""
    names = {name: None for sample in record.samples for name in sample["answers"]}
    return list(dict.fromkeys([dense(names), expert(names)])) if names else []


def _sample(number: int, sample: Mapping[str, Any], models: Sequence[str]) -> Html:
    prompt = sample["prompt"]
    end = " ".join(prompt[-_END:].split())
    shown = fold(text(f"… {end}"), [code(prompt)]) if len(prompt) > _END else paragraph(end)
    groups = [_answer("gold", sample["gold"], "")]
    for model in models:
        answer = sample["answers"].get(model)
        if answer is not None:
            groups.append(_answer(model, answer["answer"], _verdict(answer, sample["gold"])))
    is_long = max(len(sample["gold"]), *(len(sample["answers"].get(m, {}).get("answer", "")) for m in models)) > _LONG
    parts = [
        element("h3", text(f"{number}. {sample['task']}, row {sample['row'] + 1}"), {"id": f"sample-{number}"}),
        shown,
        element("dl", join(groups, "\n"), {"class": "answers long" if is_long else "answers"}),
    ]
    return element("article", join(parts, "\n"), {"class": "sample", "aria-labelledby": f"sample-{number}"})


def _answer(who: str, words: str, verdict: str) -> Html:
    told = element("span", text(verdict), {"class": "verdict"}) if verdict else Html("")
    answer = element("dd", join([text(words.strip() or "(nothing)"), told], " " if verdict else ""), {"dir": "auto"})
    return element("div", join([element("dt", text(who)), answer]))


def _verdict(answer: Answer, gold: str) -> str:
    """Right or wrong in words and symbols, never by colour alone; how clear the choice was; how close a text is."""
    if "prediction" in answer:
        read = answer["prediction"]
        told = "? unreadable" if read is None else "✓ right" if read == gold else "✗ wrong"
        if read is not None and read != answer["answer"].strip():
            told += f", read as {read}"
        margin = answer.get("margin")
        return told + ("" if margin is None else f", margin {margin:.2f}")
    return f"ROUGE-L {100 * answer['rougeL']:.0f} %" if "rougeL" in answer else ""


def _right_text(shown: Sequence[Mapping[str, Any]], model: str) -> str:
    chosen = [(s["answers"][model], s["gold"]) for s in shown if "prediction" in s["answers"].get(model, {})]
    right = sum(answer["prediction"] == gold for answer, gold in chosen)
    return f"right with {model}: {right} of {len(chosen)}" if chosen else ""
