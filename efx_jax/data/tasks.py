"""What training and evaluation consume: training rows, tasks to score and text, from files, the Hub or built in."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from efx_jax.config import DataConfig
from efx_jax.data.catalogue import OFFICIAL
from efx_jax.data.corpora import load_rows
from efx_jax.data.frames import apply_format
from efx_jax.data.icd10 import icd10_task
from efx_jax.data.mixes import Mix, Part, find_mix, naming
from efx_jax.data.official import Official, load_official
from efx_jax.data.own_answers import distinct_answers, warn_of_learned
from efx_jax.data.prompts import Example, examples_from_rows, plain_text
from efx_jax.data.sampling import sample_rows
from efx_jax.data.shortening import shorten, shorten_training, without_long_talks
from efx_jax.data.sources import (
    data_root,
    draw_mix,
    hold_out,
    icd10_training,
    leave_out_shared,
    own_examples,
    part_config,
    prompt_patterns,
)
from efx_jax.data.tokenizer import Tokenizer, encode_continuations
from efx_jax.errors import InputError

# 40 test questions for each of the 21 chapters: the smallest chapter has these and some to spare.
_ICD10_TEST_ROWS = 840
UNSCORED_ANSWER = 48  # tokens of what a model writes after a held-out prompt, for a person to read
_SHORT_ANSWER = 10


@dataclasses.dataclass(frozen=True)
class Task:
    """Held-out questions in the configured format.

    Each response is one of `labels`, the answers to choose from; without labels it is free text. `new_tokens` is the
    maximum length of a generated answer. `note` says what a reader of the scores must know. `shortened` is the number
    of rows that were too long; `context_kept` is the share of all context characters that is left. `balanced`: labels
    alternate, so the first n rows are a sample for any n.
    """

    name: str
    test: list[Example]
    labels: tuple[str, ...]
    new_tokens: int = _SHORT_ANSWER
    note: str = ""
    shortened: int = 0
    context_kept: float = 1.0
    balanced: bool = False


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run learns and is measured on, in the configured format.

    `train`: the training examples; rows of text have no prompt. `tasks`: the scored tasks (may be empty).
    `text`: held-out documents for perplexity (may be empty). `report`, JSON-serialisable: row counts, "text" as it was
    named ("" if rows are held out) and "prompts" (see `prompt_patterns`; {} if only text is learned).
    `held_out`: if `text` is made of held-out training rows, those that have a prompt; not shortened.
    """

    train: list[Example]
    tasks: tuple[Task, ...]
    text: list[str]
    report: dict[str, Any]
    held_out: list[Example] = dataclasses.field(default_factory=list)


def load_data(config: DataConfig, seed: int, tokenizer: Tokenizer | None = None, rows: int = 0) -> Data:
    """Reads the data that the config's `data` section names.

    Training rows that share a key with a test row are left out, with a warning and a count in the report; so are those
    that share a key with a test row of the mix that `data.test` does not include.

    Args:
        config: the section.
        seed: the run's seed: chooses held-out training rows and the built-in task's training rows.
        tokenizer: needed for `format: chat`, and to shorten rows.
        rows: maximum test rows per task, a fixed sample (`sample_rows`); 0 takes all. No training row is a test row,
            sampled or not.

    Returns:
        The data. Without `data.text`, a share `data.holdout` of the training rows becomes the perplexity text; the
        built-in task and some mixes bring their own text, and they and the paper's tasks bring their own test rows.

    Raises:
        InputError: any error of `load_rows`, `load_official`, `examples_from_rows`, `apply_format` or `load_tasks`, or
            a holdout outside [0, 1).
    """
    if not 0 <= config.holdout < 1:
        raise InputError(f"data.holdout: expected a share in [0, 1), found {config.holdout}")
    mix = find_mix(config.train)
    tests, text_source = held_out_sources(config)
    bare = _read_tasks(tests, config)
    train, counts = _read_training(mix, config, seed, bare, tests)
    train, held_out = (train, []) if text_source else hold_out(train, config.holdout, seed)
    text = load_text(text_source, config) if text_source else plain_text(held_out)
    train = apply_format(train, config.format, tokenizer)
    shortened = 0
    if tokenizer is not None:
        train = without_long_talks(train, tokenizer, config.max_length)
        train, shortened = shorten_training(train, tokenizer, config.max_length)
    tasks = tuple(_finish(task, config, tokenizer, rows) for task in bare)
    tested = {
        task.name: {"rows": len(task.test), "scored": len(scored.test), "shortened": scored.shortened}
        | _label_counts(task)
        for task, scored in zip(bare, tasks, strict=True)
    }
    return Data(
        train=train,
        tasks=tasks,
        text=text,
        report={
            "train": {"rows": len(train), "shortened": shortened, **counts},
            "test": tested,
            "text": text_source,
            "prompts": prompt_patterns(config) if any(example.prompt for example in train) else {},
        },
        held_out=apply_format([example for example in held_out if example.prompt], config.format, tokenizer),
    )


def held_out_sources(config: DataConfig) -> tuple[tuple[str, ...], str]:
    """The tasks that are scored and the perplexity text: those the section names, else those that come with `train`.

    Args:
        config: the section.

    Returns:
        Names for `load_tasks` (may be empty), and a name for `load_text` ("" for none).

    Raises:
        InputError: a mix that cannot be read.
    """
    mix = find_mix(config.train)
    named = (config.train,) if mix or config.train == "icd10" else ()
    text = mix.text if mix else "icd10" if config.train == "icd10" else ""
    return config.test or named, config.text or text


def load_text(source: str, config: DataConfig) -> list[str]:
    """Documents for perplexity or calibration: each row's `text`, or its prompt and response (by the template) joined.

    Args:
        source: a file, a Hub name, "icd10" (its held-out text), or a corpus known by name ("c4", "wikitext",
            "multilegalpile").
        config: supplies `root` and `template`.

    Raises:
        InputError: as in `load_rows` and `examples_from_rows`.
    """
    if source == "icd10":
        return icd10_task(0, 0, 0).text
    rows = load_rows(source, data_root(config))
    # The template is meant for training rows; a document needs none.
    template = "" if "text" in rows[0] else config.template
    return plain_text(examples_from_rows(rows, source, template))


def load_tasks(
    names: Sequence[str], config: DataConfig, tokenizer: Tokenizer | None = None, rows: int = 0
) -> tuple[Task, ...]:
    """Held-out questions in the configured format, and the answers to choose from.

    Args:
        names: the paper's tasks (`casehold:validation` names a split other than "test"), mixes (all of their tasks),
            files, Hub names, or "icd10".
        config: supplies `root`, `template`, `context`, `new_tokens`, `format` and `max_length`.
        tokenizer: needed for `format: chat`, and to shorten prompts so that the answer fits too.
        rows: maximum rows per task, a fixed sample (`sample_rows`); 0 takes all.

    Returns:
        The tasks; one read from a file has the file's name without suffix. The answers of a user's own task are its
        distinct responses, sorted (for "icd10": all chapters).

    Raises:
        InputError: any error of the readers, rows without a prompt, too many distinct responses without
            `new_tokens`, two tasks with the same name, or a prompt that is too long even with an empty context.
    """
    return tuple(_finish(task, config, tokenizer, rows) for task in _read_tasks(names, config))


def _read_tasks(names: Sequence[str], config: DataConfig) -> list[Task]:
    """The tasks with all their rows, not yet in the configured format."""
    tasks = [task for name in names for task in _read_task(name, config)]
    called = [task.name for task in tasks]
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"data.test: expected tasks of different names, found {twice} twice; rename a file")
    return tasks


def _read_task(source: str, config: DataConfig) -> list[Task]:
    if source == "icd10":
        data = icd10_task(0, 0, _ICD10_TEST_ROWS)
        return [Task("icd10", data.test, data.labels, balanced=True)]
    name, _, split = source.partition(":")
    if name in OFFICIAL and split:
        return [_official_task(source, OFFICIAL[name], split, config)]
    mix = find_mix(source)
    if mix is None:
        return [_own_task(PurePath(source).name.split(".")[0], source, config)]
    return [_part_task(mix, part, config) for part in mix.parts if part.test or not part.train]


def _part_task(mix: Mix, part: Part, config: DataConfig) -> Task:
    with naming(mix, part):
        if part.test:
            return _own_task(part.name, part.test, part_config(part, config))
        return _official_task(part.name, OFFICIAL[part.name], "test", config)


def _official_task(name: str, task: Official, split: str, config: DataConfig) -> Task:
    labels = tuple(f" {label}" for label in task.labels)
    return Task(name, load_official(task, split, data_root(config)), labels, task.new_tokens, task.note)


def _own_task(name: str, source: str, config: DataConfig) -> Task:
    test = own_examples(source, config)
    without = next((example for example in test if not example.prompt.strip()), None)
    if without is not None:
        raise InputError(f"{without.origin}: a test row needs a prompt and a response; set data.template, or data.text")
    if config.new_tokens:
        return Task(name, test, (), config.new_tokens)
    return Task(name, test, distinct_answers(test, source))


def _finish(task: Task, config: DataConfig, tokenizer: Tokenizer | None, rows: int) -> Task:
    """A sample of a task's rows in the configured format, shortened to leave room for the longest answer."""
    chosen = task.test[: rows or None] if task.balanced else sample_rows(task.test, rows)
    labelled = [Example("?", label) for label in task.labels]
    framed = apply_format([*chosen, *labelled], config.format, tokenizer)
    test, labels = framed[: len(chosen)], tuple(example.response for example in framed[len(chosen) :])
    if tokenizer is None:
        return dataclasses.replace(task, test=test, labels=labels)
    answers = [len(ids) + 1 for ids in encode_continuations(labels, tokenizer)]
    whole = _context_length(test)
    test, shortened = shorten(test, tokenizer, config.max_length, max([task.new_tokens, *answers]))
    kept = _context_length(test) / whole if whole else 1.0
    return dataclasses.replace(task, test=test, labels=labels, shortened=shortened, context_kept=kept)


def _context_length(examples: Sequence[Example]) -> int:
    return sum(example.context[1] - example.context[0] for example in examples)


def _read_training(
    mix: Mix | None, config: DataConfig, seed: int, tests: Sequence[Task], names: Sequence[str]
) -> tuple[list[Example], dict[str, Any]]:
    """The training rows, not yet in the configured format, and counts of each part."""
    if config.train == "icd10":
        return icd10_training(seed), {}
    tested = [example for task in tests for example in task.test]
    if mix is None:
        train, shared = leave_out_shared(own_examples(config.train, config), tested, config.train)
        for task in tests:
            asked = [example for example in train if example.prompt]
            warn_of_learned(asked, task.labels, task.name, config.format)
        return train, {"shared": shared}
    # A file may have the same name as a task.
    mixes = [found for found in map(find_mix, names) if found]
    scored = {(part.name, part.test) for found in mixes for part in found.parts}
    for part in mix.parts:
        known = (part.name, part.test) in scored or (part.train and not part.test)
        tested += [] if known else _unscored(mix, part, config)
    return draw_mix(mix, config, tested, {task.name: task.labels for task in tests})


def _unscored(mix: Mix, part: Part, config: DataConfig) -> list[Example]:
    """The test rows of a task that this run does not score, since a later evaluation may."""
    try:
        return _part_task(mix, part, config).test
    except InputError as error:
        warnings.warn(f"training rows are not compared with the test rows of {part.name}: {error}", stacklevel=2)
        return []


def _label_counts(task: Task) -> dict[str, Any]:
    if not task.labels:
        return {}
    counts = Counter(example.response.strip() for example in task.test)
    return {"labels": {label.strip(): counts[label.strip()] for label in task.labels}}
