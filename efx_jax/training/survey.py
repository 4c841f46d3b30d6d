"""What a run would find and compute, without loading weights: its data, its widest forward pass, misfits."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from efx_jax.config import Config
from efx_jax.config_event import matrix_group, n_of_m
from efx_jax.data.batches import ATTENTION_MULTIPLE, bucket_length, up_to_multiple
from efx_jax.data.sources import data_root
from efx_jax.data.tasks import UNSCORED_ANSWER, Data, load_data
from efx_jax.data.tokens import text_windows
from efx_jax.errors import InputError, MissingInputError
from efx_jax.model.spec import ModelSpec, linear_shapes
from efx_jax.parallel.fit import Sizes, check_mesh
from efx_jax.pruning.permutation import movable_inputs
from efx_jax.pruning.selection import SLAB, selection_counts
from efx_jax.structural.slicing import settle_masks
from efx_jax.structural.units import units_of
from efx_jax.training.activations import Layout
from efx_jax.training.devices import Device
from efx_jax.training.feed import epoch_rows, rows_per_pass
from efx_jax.training.rows import own_rows, read_texts, taught_texts, training_rows
from efx_jax.training.schedule import prune_events
from efx_jax.training.validation import check_validation
from efx_jax.weights.hf import load_tokenizer
from efx_jax.weights.peft import check_adapter
from efx_jax.weights.shapes import FoundSpec


@dataclasses.dataclass(frozen=True)
class DataCounts:
    """What the data holds: training sequences and their input tokens, rows of an epoch, the longest sequence, test
    sizes, the longest answer that is generated to test rows, and the rows of every task."""

    sequences: int
    tokens: int
    epoch_rows: int
    longest: int
    test_rows: int
    windows: int
    answer_tokens: int
    report: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """What is known of the data without a tokenizer: training rows, test rows, the longest answer that is generated,
    and the rows of every task."""

    rows: int
    test_rows: int
    answer_tokens: int
    report: Mapping[str, Any]


def check_shapes(config: Config, spec: ModelSpec) -> None:
    """Refuses settings that do not fit the model: row length, adapter, sparsity and group of every matrix, mesh.

    Raises:
        InputError: names the first that does not fit.
    """
    prune = config.prune
    if config.data.max_length > spec.max_position_embeddings:
        raise InputError(
            f"data.max_length: expected at most the model's context of {spec.max_position_embeddings} tokens, "
            f"found {config.data.max_length}; lower data.max_length"
        )
    if config.lora.adapter:
        check_adapter(config.lora.adapter, spec)
    shapes = linear_shapes(spec)
    if prune.score == "atp" and prune.sparsity:
        _check_ratio(spec, config)
    for name in prune.targets if prune.sparsity else ():
        shape = (spec.num_layers, *shapes[name])
        selection_counts(shape, prune.sparsity, matrix_group(name, prune), prune.bound)
    if prune.permute and prune.sparsity:
        movable_inputs(spec, prune)
    pattern = n_of_m(prune.group)
    sizes = Sizes(
        linears=shapes,
        heads=(spec.num_heads, spec.num_kv_heads),
        vocabulary=spec.vocab_size,
        micro_batch=config.train.micro_batch or config.train.batch_size,
        block=math.lcm(8, pattern[1]) if pattern else SLAB if prune.sparsity and prune.group == "slab" else 8,
    )
    check_mesh(config.mesh, sizes)


def _check_ratio(spec: ModelSpec, config: Config) -> None:
    """Refuses a sparsity that no choice of units can reach."""
    logits: Any = {
        kind: np.zeros((spec.num_layers, units.count)) for kind, units in units_of(spec, config.atp.space).items()
    }
    try:
        settle_masks(logits, spec, config.atp.space, config.prune.sparsity)
    except InputError as error:
        raise InputError(f"prune.sparsity is too high for prune.score atp: {error}") from None


def count_data(config: Config, found: FoundSpec) -> DataCounts | RowCounts | str:
    """Counts what training would read (without a tokenizer, only rows), or says why it cannot be counted here.

    Raises:
        InputError: malformed data, or as `check_validation`.
    """
    data_root(config.data)
    try:
        if not found.on_disk:
            bare = load_data(dataclasses.replace(config.data, format="plain"), config.seed, None, config.eval.rows)
            tested = sum(len(task.test) for task in bare.tasks)
            return RowCounts(len(bare.train), tested, _answer_tokens(config, bare), bare.report)
        tokenizer = load_tokenizer(config.model.path)
        data = load_data(config.data, config.seed, tokenizer, config.eval.rows)
        texts = read_texts(taught_texts(config), config)
        train = training_rows(config, own_rows(config, data, tokenizer), tokenizer, texts)
        window, limit = config.eval.window, config.eval.text_tokens
        windows = text_windows(data.text, tokenizer, window, limit) if data.text else []
    except MissingInputError as error:
        # A run may be planned on a machine without its data.
        return f"not counted: {error}"
    check_validation(config, data)
    lengths = [len(example.tokens) - 1 for example in train]
    return DataCounts(
        sequences=len(train),
        tokens=sum(lengths),
        epoch_rows=epoch_rows(config, train),
        longest=max(lengths),
        test_rows=sum(len(task.test) for task in data.tasks),
        windows=len(windows),
        answer_tokens=_answer_tokens(config, data),
        report=data.report,
    )


def _answer_tokens(config: Config, data: Data) -> int:
    """Tokens of the longest answer that evaluation generates: to free text, by its protocol, or to held-out prompts."""
    if data.tasks:
        generated = [task for task in data.tasks if config.eval.protocol != "likelihood" or not task.labels]
        return max((task.new_tokens for task in generated), default=0)
    return UNSCORED_ANSWER if config.eval.samples > 0 and data.held_out else 0


def plan_layout(config: Config, found: FoundSpec, device: Device, data: DataCounts | RowCounts | str) -> Layout:
    """The widest forward pass of the run: its longest rows, in the micro-batches of the settings."""
    packing = config.data.batching == "packing"
    length = config.data.max_length
    if not packing:
        longest = data.longest if isinstance(data, DataCounts) else length - 1  # the last token is never an input
        in_buckets = config.data.batching == "buckets"
        length = up_to_multiple(longest, ATTENTION_MULTIPLE) if in_buckets else bucket_length([longest], longest)
    narrow = config.model.compute_dtype in ("bfloat16", "float16")
    head_dim = found.spec.head_dim
    return Layout(
        dtype=found.dtype if config.model.dtype == "keep" else config.model.dtype,
        rows=rows_per_pass(config, length),
        length=length,
        # The number of events matters here, not their steps.
        events=len(prune_events(config.prune, config.train, 10**6)),
        # With a fixed order of sums, cuDNN's backward pass materializes the scores.
        fused_attention=device.gpu
        and narrow
        and not (packing or config.train.deterministic)
        and head_dim % 8 == 0
        and head_dim <= 256,
        answer_tokens=0 if isinstance(data, str) else data.answer_tokens,
    )
