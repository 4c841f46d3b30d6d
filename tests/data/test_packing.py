"""Packed rows hold every sequence once and train to the same loss as a row for each."""

import csv
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.data import packing
from efx_jax.data.batches import make_batch
from efx_jax.data.packing import pack_epoch, packed_batch, packed_rows
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.model.cudnn_attention import MAX_RUNS, segment_runs
from efx_jax.model.spec import linear_shapes, param_shapes, spec_from_config
from efx_jax.training.step import StepOptions, summed_loss

LENGTH = 16
SIZES = [int(size) for size in np.random.default_rng(0).integers(1, LENGTH + 1, 200)]


def sequences(sizes: list[int]) -> list[Tokenized]:
    """Sequence i has `sizes[i]` inputs; its tokens are distinct from every other's."""
    starts = np.cumsum([0, *(size + 1 for size in sizes[:-1])])
    rng = np.random.default_rng(1)
    return [
        Tokenized(tokens=np.arange(start, start + size + 1, dtype=np.int32), loss=rng.random(size + 1) < 0.5)
        for start, size in zip(starts, sizes, strict=True)
    ]


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_sequence_stands_in_one_row_and_no_row_overflows(epoch: int) -> None:
    rows = pack_epoch(SIZES, 3, epoch, LENGTH)
    assert sorted(sequence for row in rows for sequence in row) == list(range(len(SIZES)))
    assert max(sum(SIZES[sequence] for sequence in row) for row in rows) <= LENGTH
    assert sum(SIZES) / (LENGTH * len(rows)) > 0.9


def test_packing_depends_on_its_arguments_alone() -> None:
    first = pack_epoch(SIZES, 3, 0, LENGTH)
    assert pack_epoch(list(SIZES), 3, 0, LENGTH) == first
    assert pack_epoch(SIZES, 4, 0, LENGTH) != first != pack_epoch(SIZES, 3, 1, LENGTH)


def test_full_and_no_sequences_pack() -> None:
    assert sorted(pack_epoch([LENGTH] * 3, 0, 0, LENGTH)) == [[0], [1], [2]]
    assert pack_epoch([], 0, 0, LENGTH) == []
    assert len(pack_epoch([4] * 100, 0, 0, LENGTH)) == 25


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(InputError, match="at most 16 inputs, found 17"):
        pack_epoch([3, 17], 0, 0, LENGTH)
    with pytest.raises(InputError, match="at least one example"):
        packed_batch([], 0, 0, 2, LENGTH)


def test_batches_walk_through_every_row_of_an_epoch_and_on_into_the_next() -> None:
    examples = sequences(SIZES[:30])
    assert packed_rows(examples, 0, LENGTH) % 3, "a batch must cross the end of an epoch"
    epochs = [row for epoch in range(3) for row in pack_epoch(SIZES[:30], 0, epoch, LENGTH)]
    for n in range(len(epochs) // 3):
        tokens = packed_batch(examples, 0, n, 3, LENGTH)["tokens"]
        for found, row in zip(tokens, epochs[3 * n : 3 * n + 3], strict=True):
            inputs = np.concatenate([examples[sequence].tokens[:-1] for sequence in row])
            np.testing.assert_array_equal(found[: len(inputs)], inputs)


def test_a_batch_of_an_epoch_far_ahead_packs_no_epoch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []

    def counted(sizes: Any, seed: int, epoch: int, length: int) -> list[list[int]]:
        packed.append(epoch)
        return pack_epoch(sizes, seed, epoch, length)

    monkeypatch.setattr(packing, "pack_epoch", counted)
    examples = sequences(SIZES[:30])
    per_epoch = len(pack_epoch(SIZES[:30], 99, 0, LENGTH))
    for n in range(12 * per_epoch, 12 * per_epoch + 5):
        packed_batch(examples, 99, n, 1, LENGTH)
    assert len(packed) == len(set(packed)) <= 14


def test_long_and_short_sequences_are_spread_over_the_whole_epoch() -> None:
    windows, short = [1024] * 300, [300] * 1000
    rows = pack_epoch(windows + short, 0, 0, 1024)
    whole = np.asarray([len(row) == 1 and row[0] < 300 for row in rows])
    tenths = [part.mean() for part in np.array_split(whole, 10)]
    assert abs(whole.mean() - 300 / 634) < 0.01  # the others stand in threes
    assert max(abs(share - whole.mean()) for share in tenths) < 0.2


def test_a_row_is_laid_out_segment_by_segment() -> None:
    examples = sequences(SIZES[:30])
    row = max(pack_epoch(SIZES[:30], 0, 0, LENGTH)[:4], key=len)
    index = pack_epoch(SIZES[:30], 0, 0, LENGTH).index(row)
    batch = {name: array[index] for name, array in packed_batch(examples, 0, 0, 4, LENGTH).items()}
    assert len(row) > 1 and batch["lengths"] == sum(SIZES[sequence] for sequence in row)
    start = 0
    for segment, sequence in enumerate(row, start=1):
        example, place = examples[sequence], slice(start, start + SIZES[sequence])
        np.testing.assert_array_equal(batch["tokens"][place], example.tokens[:-1])
        np.testing.assert_array_equal(batch["targets"][place], example.tokens[1:])
        np.testing.assert_array_equal(batch["weights"][place], example.loss[1:])
        np.testing.assert_array_equal(batch["positions"][place], np.arange(SIZES[sequence]))
        assert (batch["segments"][place] == segment).all()
        start = place.stop
    assert (batch["segments"][start:] == -1).all() and not batch["weights"][start:].any()


def test_a_host_lays_out_its_rows_alone_at_the_length_of_the_whole_batch() -> None:
    examples = sequences(SIZES[:60])
    for multiple in (None, 4):
        whole = packed_batch(examples, 0, 2, 6, LENGTH, multiple)
        for name, array in packed_batch(examples, 0, 2, 6, LENGTH, multiple, rows=slice(2, 4)).items():
            np.testing.assert_array_equal(array, whole[name][2:4])


def test_rows_filled_alike_share_a_batch_no_longer_than_its_fullest_row_rounded_up() -> None:
    examples = sequences([9, 10, 11, 12, 13] * 20)
    plain = [packed_batch(examples, 0, n, 10, LENGTH) for n in range(20)]
    found = [packed_batch(examples, 0, n, 10, LENGTH, multiple=4) for n in range(20)]
    assert {batch["tokens"].shape[1] for batch in plain} == {LENGTH}
    assert {batch["tokens"].shape[1] for batch in found} == {12, LENGTH}
    for epoch in range(2):
        batches = found[10 * epoch : 10 * epoch + 10]
        kept = np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in batches])
        np.testing.assert_array_equal(
            np.sort(kept), np.sort(np.concatenate([example.tokens[:-1] for example in examples]))
        )


def test_a_row_holds_no_more_sequences_than_flash_attention_takes() -> None:
    rows = pack_epoch([1] * 1000, 0, 0, 512)
    assert max(len(row) for row in rows) == MAX_RUNS - 1
    batch = packed_batch(sequences([1] * 1000), 0, 0, 4, 512)
    assert segment_runs(jnp.asarray(batch["segments"]), MAX_RUNS)[2].all()


def padding(sizes: np.ndarray, length: int, batch_size: int = 16) -> float:
    """The share of padding over two epochs of batches whose T is a multiple of 128; longer sequences are cut."""
    examples = [Tokenized(np.zeros(n + 1, np.int32), np.ones(n + 1, bool)) for n in np.minimum(sizes, length)]
    batches = 2 * packed_rows(examples, 0, length) // batch_size
    real = cells = 0
    for n in range(batches):
        batch = packed_batch(examples, 0, n, batch_size, length, multiple=128)
        real, cells = real + int(batch["lengths"].sum()), cells + batch["tokens"].size
    return 1 - real / cells


# Log-normal by median and spread, clipped: as of abstracts, consumer questions, court holdings, contracts and bills.
@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize(
    ("count", "median", "spread", "least", "most"),
    [
        (1000, 333, 0.3, 77, 821),
        (1000, 90, 0.6, 20, 515),
        (1500, 400, 0.15, 164, 729),
        (400, 1670, 0.6, 382, 5188),
        (100, 2100, 0.45, 1075, 5230),
    ],
    ids=["abstracts", "questions", "holdings", "contracts", "bills"],
)
def test_at_most_a_tenth_of_packed_batches_is_padding(
    count: int, median: int, spread: float, least: int, most: int, length: int
) -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(median), spread, count)
    assert padding(np.clip(drawn, least, most).astype(int), length) <= 0.1


@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("task", ["pubmedqa", "casehold", "contract_nli", "billsum", "evidence_inference"])
def test_at_most_a_tenth_of_packed_batches_of_a_task_file_is_padding(task: str, length: int) -> None:
    """Lengths by four characters a token, so that no tokenizer is needed."""
    sizes = np.asarray([1 + len(text) // 4 for text in _texts(task)])
    assert padding(sizes, length) <= 0.1


def _texts(task: str) -> list[str]:
    if not os.environ.get("EFX_DATA"):
        pytest.skip("EFX_DATA names no folder of task files")
    root = Path(os.environ["EFX_DATA"]) / task
    if task == "pubmedqa":
        return [
            " ".join([*row["CONTEXTS"], row["QUESTION"]])
            for row in json.loads((root / "ori_pqal.json").read_text()).values()
        ]
    if task == "evidence_inference":
        with (root / "v2_annotations.csv").open(newline="") as lines:
            return [row["Annotations"] for row in csv.DictReader(lines)]
    if task == "contract_nli":
        data = json.loads((root / "train_truncated.json").read_text())
        return [document["text"] for document in data["documents"] for _ in data["labels"]]
    file = {"casehold": "train.jsonl", "billsum": "us_train_data.jsonl"}[task]
    rows = [json.loads(line) for line in (root / file).read_text().splitlines()]
    keys = {"billsum": ["text", "summary"], "casehold": ["citing_prompt", *(f"holding_{i}" for i in range(5))]}[task]
    return [" ".join(str(row[key]) for key in keys) for row in rows]


SPEC = spec_from_config(
    {
        "model_type": "llama",
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
)


@pytest.fixture(scope="module")
def loss_and_gradients() -> Callable[[dict[str, np.ndarray]], Any]:
    """Summed over a batch, of a random masked model with random adapters."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)

    params = jax.tree.map(draw, param_shapes(SPEC), is_leaf=lambda shape: isinstance(shape, tuple))
    shapes = linear_shapes(SPEC)
    adapters = Adapters(
        lora_a={name: draw((2, 2, columns)) for name, (_, columns) in shapes.items()},
        lora_b={name: draw((2, rows, 2)) for name, (rows, _) in shapes.items()},
        scale=2.0,
    )
    masks = {name: jnp.asarray(rng.random((2, *shape)) < 0.5) for name, shape in shapes.items()}
    arrays = {"lora_a": adapters.lora_a, "lora_b": adapters.lora_b}
    key = jax.random.key(0)
    loss = functools.partial(summed_loss, spec=SPEC, options=StepOptions())
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda batch: step(arrays, adapters, params, masks, batch, key)


def test_packed_equals_separate(loss_and_gradients: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """One epoch in packed rows and in a row for each sequence: the same loss, entropy and gradients."""
    examples = sequences([4, 2, 5, 9, 1, 7, 11, 3])
    packed = packed_batch(examples, 0, 0, packed_rows(examples, 0, LENGTH), LENGTH)
    separate = make_batch(examples, 0, 0, len(examples), LENGTH)
    assert packed["tokens"].shape[0] < separate["tokens"].shape[0]
    assert packed["weights"].sum() == separate["weights"].sum() > 10
    for found, expected in zip(
        jax.tree.leaves(loss_and_gradients(packed)), jax.tree.leaves(loss_and_gradients(separate)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    (unseparated, _), _ = loss_and_gradients(packed | {"segments": np.ones_like(packed["segments"])})
    (loss, _), _ = loss_and_gradients(packed)
    assert abs(float(unseparated - loss)) > 1e-2
