"""From settings to all inputs of training: model, tokens, calibration. Bad input is rejected here, early."""

import dataclasses
import itertools
import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from efx_jax.config import Config
from efx_jax.data.batches import Batch, calibration_batches
from efx_jax.data.tasks import Data, Task, load_data
from efx_jax.data.tokenizer import check_same_tokens, check_vocabulary
from efx_jax.data.tokens import Tokenized, checksum, text_windows
from efx_jax.errors import InputError
from efx_jax.evaluation.protocols import check_protocol
from efx_jax.lora import Adapters
from efx_jax.model.spec import ModelSpec, linear_shapes, spec_from_config
from efx_jax.parallel.fit import Sizes, misfits
from efx_jax.parallel.hosts import are_alike, together
from efx_jax.parallel.partition import tree_shardings
from efx_jax.training.rows import Texts, calibration_texts, own_rows, read_texts, taught_texts, training_rows
from efx_jax.training.step import Teacher, has_teacher
from efx_jax.training.survey import check_shapes
from efx_jax.training.validation import check_validation
from efx_jax.weights.hf import load_pretrained, load_tokenizer, open_checkpoint
from efx_jax.weights.peft import load_adapter

_CHOICE = 8
"""A calibration text supplies up to this many times the calibration rows to draw from, if it is long enough."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Inputs of a run.

    `train`: what batches are drawn from; `windows`: the perplexity text; `pools`: the sequences that calibration draws
    from, by source; `adapters`: those of `lora.adapter` to start training from, or None; `teacher`: what the pruned
    model also learns from, or None.
    """

    params: dict[str, Any]
    spec: ModelSpec
    tokenizer: Any
    data: Data
    train: list[Tokenized]
    windows: list[Tokenized]
    pools: tuple[list[Tokenized], ...]
    adapters: Adapters | None = None
    teacher: Teacher | None = None


def prepare(config: Config, mesh: Mesh) -> Prepared:
    """Reads model and data, and checks that they fit each other, the settings and the mesh.

    Raises:
        InputError: anything wrong with the checkpoint, the rows or the settings.
    """
    with together():
        spec = spec_from_config(open_checkpoint(config.model.path).config)
        check_shapes(config, spec)
        adapters = load_adapter(config.lora.adapter, spec) if config.lora.adapter else None
        tokenizer = load_tokenizer(config.model.path)
        data = load_data(config.data, config.seed, tokenizer, config.eval.rows)
        own = own_rows(config, data, tokenizer)
        texts = read_texts([*calibration_texts(config), *taught_texts(config)], config)
        train = training_rows(config, own, tokenizer, texts)
        windows = text_windows(data.text, tokenizer, config.eval.window, config.eval.text_tokens) if data.text else []
        pools = _calibration_pools(config, own, tokenizer, texts)
        check_vocabulary(tokenizer, spec.vocab_size)
        check_validation(config, data)
        _check_teacher(config, spec, tokenizer)
        _check_evaluation(config, spec, windows, data.tasks, tokenizer)
        _say_untaught(config)
    _refuse_different_hosts([*train, *windows, *itertools.chain(*pools)], data.tasks)
    dtype = None if config.model.dtype == "keep" else config.model.dtype
    place = mesh if mesh.size > 1 else None
    params, _ = load_pretrained(config.model.path, dtype, place)
    teacher = None
    if has_teacher(config):
        is_base = config.distill.teacher == "base"
        teacher = Teacher(*((params, spec) if is_base else load_pretrained(config.distill.teacher, dtype, place)))
    if adapters is not None:
        adapters = jax.device_put(adapters, tree_shardings(mesh, adapters))
    return Prepared(params, spec, tokenizer, data, train, windows, pools, adapters, teacher)


def calibration(config: Config, prepared: Prepared, rows: int | None = None) -> list[Batch]:
    """The calibration batches: the same at every event, so that scores of different events are comparable.

    Args:
        config: the settings.
        prepared: the sequences to draw from.
        rows: how many; None: `prune.calibration_rows`.
    """
    prune = config.prune
    length = min(prune.calibration_length, prepared.spec.max_position_embeddings)
    shards = config.mesh.data * config.mesh.fsdp
    share, rest = divmod(prune.calibration_rows if rows is None else rows, len(prepared.pools))
    return [
        batch
        for index, pool in enumerate(prepared.pools)
        if share + (index < rest)
        for batch in calibration_batches(
            pool, config.seed, share + (index < rest), length, prune.calibration_tokens, shards
        )
    ]


def _calibration_pools(
    config: Config, train: list[Tokenized], tokenizer: Any, texts: Texts
) -> tuple[list[Tokenized], ...]:
    """The sequences of every source; the training rows, which also replace a missing text, are included only once."""
    # The last token of a sequence is never an input. More rows than requested, so that seeds draw different ones.
    window = config.prune.calibration_length + 1
    limit = _CHOICE * config.prune.calibration_rows * window
    pools: list[list[Tokenized]] = []
    for source in config.prune.calibration:
        is_text = source != "train" and source in texts
        name = f"prune.calibration {source}"
        pool = text_windows(texts[source], tokenizer, window, limit, name) if is_text else train
        if not any(pool is other for other in pools):
            pools.append(pool)
    return tuple(pools)


def tasks_checksum(tasks: Sequence[Task], start: int = 0) -> int:
    """A checksum, continued from `start`, of the rows that models are scored on."""
    # Excludes where a row came from, which may differ: every host has its own copy of the files.
    asked = [(task.name, task.labels, [(row.prompt, row.response) for row in task.test]) for task in tasks]
    return zlib.crc32(repr(asked).encode(), start)


def _refuse_different_hosts(sequences: Iterable[Tokenized], tasks: Sequence[Task]) -> None:
    """Every host reads its own files and places its own rows of batches, which all hosts must draw identically."""
    if jax.process_count() == 1:
        return
    if not are_alike(tasks_checksum(tasks, int(checksum(sequences), 16))):
        raise InputError(
            "several hosts: expected the same rows and texts on each of them, found different ones; give all of them "
            "the same files (data.root, HF_HOME), or the same lack of network"
        )


def _say_untaught(config: Config) -> None:
    """Warns if a teacher or its text is set but unused (except without pruning, where neither is expected to be)."""
    distill = config.distill
    if has_teacher(config) or config.prune.sparsity == 0:
        return
    if distill.teacher:
        reason = "every token has a label of its own (data.loss_on all)"
        warnings.warn(f"distill.teacher {distill.teacher}: teaches nothing, as {reason}", stacklevel=2)
    elif distill.text:
        warnings.warn(f"distill.text {distill.text}: is not read, as there is no distill.teacher", stacklevel=2)


def _check_teacher(config: Config, spec: ModelSpec, tokenizer: Any) -> None:
    path = config.distill.teacher
    if not has_teacher(config) or path == "base":
        return
    other = spec_from_config(open_checkpoint(path).config)
    if other.vocab_size != spec.vocab_size:
        raise InputError(
            f"distill.teacher {path}: has a vocabulary of {other.vocab_size:,} tokens, expected the model's "
            f"{spec.vocab_size:,}; take a teacher with the same tokenizer"
        )
    if other.max_position_embeddings < config.data.max_length:
        raise InputError(
            f"distill.teacher {path}: has a context of {other.max_position_embeddings:,} tokens, expected at least "
            f"data.max_length {config.data.max_length:,}; lower that, or take another teacher"
        )
    # It is sharded like the model, except that heads may be split: it keeps no key/value cache.
    sizes = Sizes(linears=linear_shapes(other), heads=(), vocabulary=other.vocab_size, micro_batch=0, block=1)
    problem = next(misfits(config.mesh, sizes), None)
    if problem is not None:
        raise InputError(f"distill.teacher {path}: {problem} of this mesh; take another mesh, or another teacher")
    check_same_tokens(tokenizer, load_tokenizer(path), f"distill.teacher {path}")


def _check_evaluation(
    config: Config, spec: ModelSpec, windows: list[Tokenized], tasks: Sequence[Task], tokenizer: Any
) -> None:
    longest = max((len(window.tokens) for window in windows), default=0)
    if longest > spec.max_position_embeddings:
        raise InputError(
            f"eval.window: expected at most the model's context of {spec.max_position_embeddings} tokens, "
            f"found {longest}; lower eval.window"
        )
    for task in tasks:
        check_protocol(spec, tokenizer, task, config.eval.protocol)
