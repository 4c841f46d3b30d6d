"""Training rows, not yet formatted: a user's own, the parts of a mix, and the built-in task's."""

import dataclasses
import os
import pathlib
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from efx_jax.config import DataConfig
from efx_jax.config_values import nearest
from efx_jax.data import icd10
from efx_jax.data.catalogue import OFFICIAL
from efx_jax.data.corpora import CORPORA, load_rows
from efx_jax.data.mixes import Mix, Part, find_mix, mix_names, naming
from efx_jax.data.official import load_official
from efx_jax.data.overlap import fingerprint, group_numbers, without_shared
from efx_jax.data.own_answers import MOST_LABELS, warn_of_learned, warn_of_slips
from efx_jax.data.prompts import Example, examples_from_rows, prompt_pattern, write_fields
from efx_jax.data.sampling import draw, equal_quotas
from efx_jax.errors import InputError
from efx_jax.rounding import round_up

# 150 questions and 50 texts of about 50 tokens for each of the 21 chapters: the smallest chapter has these and some to
# spare.
_ICD10_ROWS = 3150
_ICD10_TEXTS = 350


def data_root(config: DataConfig) -> str:
    """The folder of the data files: `data.root`, else the environment variable EFX_DATA, else "".

    Raises:
        InputError: the path is not a folder; without this error a mistyped path would silently use the Hub.
    """
    root = config.root or os.environ.get("EFX_DATA", "")
    if root and not pathlib.Path(root).expanduser().is_dir():
        setting = "data.root" if config.root else "EFX_DATA"
        raise InputError(f"{setting}: no folder {root}; expected the folder of the data files; correct the path")
    return root


def own_examples(source: str, config: DataConfig) -> list[Example]:
    """A user's own rows, identified by their prompt (with the conversation before it) or, without one, by their text.

    Raises:
        InputError: as in `load_rows` and `examples_from_rows`, or a single word that names no file.
    """
    root = data_root(config)
    _check_word(source, root)
    examples = examples_from_rows(load_rows(source, root), source, config.template, config.context)
    answers = Counter(example.origin for example in examples)
    return [dataclasses.replace(example, keys=_keys(example, answers[example.origin] > 1)) for example in examples]


def _keys(example: Example, has_others: bool) -> tuple[str, ...]:
    """What identifies an example; the answers of one conversation also share their row's origin, so stay together."""
    said = [turn.content for turn in example.turns]
    asked = fingerprint(*said, example.prompt or example.response)
    return (asked, example.origin) if has_others else (asked,)


def _check_word(source: str, root: str) -> None:
    files = [pathlib.Path(folder).expanduser() / source for folder in (".", root)]
    if re.fullmatch(r"[\w-]+", source) and source not in CORPORA and not any(file.exists() for file in files):
        known = ["icd10", *OFFICIAL, *mix_names(), *CORPORA]
        raise InputError(
            f"{source}: no task, mix or file of that name; the nearest is {nearest(source, known)}; expected one of "
            f"{', '.join(known)}, a file, or a Hub name owner/name"
        )


def part_config(part: Part, config: DataConfig) -> DataConfig:
    """The `data` section with the template, context and answer length of a part of a mix."""
    return dataclasses.replace(config, template=part.template, context=part.context, new_tokens=part.new_tokens)


def prompt_patterns(config: DataConfig) -> dict[str, dict[str, str]]:
    """How the prompts of all training data are written, before `data.format` frames them.

    Args:
        config: names the training rows and their template.

    Returns:
        By task: "prompt", with the columns to be filled in braces, and "instruction", "" if the task has none.

    Raises:
        InputError: a mix or a template that cannot be read.
    """
    mix = find_mix(config.train)
    if mix is not None:
        return {part.name: _part_pattern(part) for part in mix.parts if part.train or not part.test}
    name = PurePath(config.train).name.split(".")[0]
    pattern = icd10.PROMPT if config.train == "icd10" else prompt_pattern(config.template)
    return {name: {"instruction": "", "prompt": pattern}}


def _part_pattern(part: Part) -> dict[str, str]:
    if part.train:
        return {"instruction": "", "prompt": prompt_pattern(part.template)}
    task = OFFICIAL[part.name]
    headed = [(heading, f"{{{name}}}") for heading, name in task.fields]
    return {"instruction": task.instruction, "prompt": write_fields(headed, task.context)[0]}


def icd10_training(seed: int) -> list[Example]:
    """The built-in task's questions, and its texts as examples without a prompt."""
    data = icd10.icd10_task(seed, _ICD10_ROWS, 0)
    texts = data.train_text[:_ICD10_TEXTS]
    return data.train + [Example("", text, f"icd10 text {number}") for number, text in enumerate(texts, start=1)]


def draw_mix(
    mix: Mix, config: DataConfig, tested: Sequence[Example], labels: Mapping[str, Sequence[str]]
) -> tuple[list[Example], dict[str, Any]]:
    """The training rows of every part of a mix, without those that share a key with a test row.

    Args:
        mix: the mix.
        config: supplies `root`.
        tested: all test rows of the run.
        labels: the answers to choose from, by name of the scored task.

    Returns:
        The rows, part after part, and counts: {"tasks": {name: {asked, found, shared, drawn, repeated, labels}}}.

    Raises:
        InputError: any error of the readers, a label without rows, or no part to learn from.
    """
    train: list[Example] = []
    counts: dict[str, Any] = {}
    learned = [part for part in mix.parts if part.train or not part.test]
    if not learned:
        raise InputError(f"{mix.name}: no task has training rows; expected train: below at least one")
    for place, part in enumerate(learned):
        with naming(mix, part):
            examples = _read_part(part, config)
            if part.name in labels:
                warn_of_learned(examples, labels[part.name], part.name, config.format, is_own=True)
            elif part.train and not part.new_tokens:
                warn_of_slips(examples)
            kept, shared = leave_out_shared(examples, tested, part.name)
            drawn, counted = draw(kept, _quotas(part, kept), part.upsample, mix.seed + place, part.name)
        train += drawn
        counts[part.name] = counted | {"found": len(examples), "shared": shared}
    return train, {"tasks": counts}


def _read_part(part: Part, config: DataConfig) -> list[Example]:
    if part.train:
        return own_examples(part.train, part_config(part, config))
    return load_official(OFFICIAL[part.name], part.split, data_root(config))


def _quotas(part: Part, examples: Sequence[Example]) -> dict[str, int]:
    """Rows to draw per label; the only label is "" if the answers are free text."""
    if part.labels:
        return dict(part.labels)
    found = Counter(example.response.strip() for example in examples)
    chosen_from = not part.new_tokens and len(found) <= MOST_LABELS if part.train else bool(OFFICIAL[part.name].labels)
    if not chosen_from:
        return {"": part.rows or len(examples)}
    return equal_quotas(part.rows, sorted(found)) if part.rows else dict(sorted(found.items()))


def leave_out_shared(train: Sequence[Example], tested: Sequence[Example], name: str) -> tuple[list[Example], int]:
    """The training rows that share no key with a test row, and the number of the others; one warning counts them.

    Raises:
        InputError: every training row is a test row.
    """
    kept, shared = without_shared(train, tested)
    if train and not kept:
        raise InputError(f"{name}: every training row is a test row too; expected others; check train and test")
    if shared:
        warnings.warn(
            f"{name}: {len(shared)} training rows are test rows too and are left out, the first is {shared[0].origin}",
            stacklevel=2,
        )
    return kept, len(shared)


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Holds out about `share` of the rows; rows that share a key, such as questions on one document, stay together.

    Args:
        examples: the rows.
        share: minimum share of the rows to hold out; less if that would leave none for training.
        seed: chooses the held-out rows.

    Returns:
        The rows that stay and those held out, each in the given order.
    """
    count = min(round_up(share * len(examples)), len(examples) - 1)
    groups = group_numbers(examples)
    sizes = Counter(groups)
    held: set[int] = set()
    taken = 0
    for row in np.random.default_rng([seed, len(examples)]).permutation(len(examples)):
        group = groups[row]
        if taken < count and group not in held and taken + sizes[group] < len(examples):
            held.add(group)
            taken += sizes[group]
    kept = [example for example, group in zip(examples, groups, strict=True) if group not in held]
    return kept, [example for example, group in zip(examples, groups, strict=True) if group in held]
