"""A teacher's divergence and its gradient against the plain formula, and the steps that learn from one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efx_jax.config import TrainConfig
from efx_jax.data.batches import pad_batch
from efx_jax.data.tokens import Tokenized
from efx_jax.lora import init_lora
from efx_jax.model.decoder import forward
from efx_jax.model.spec import LINEARS, init_params
from efx_jax.training.distillation import divergence, positions_read, taught_rows, taught_weights
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import init_train_state, trainable
from efx_jax.training.step import StepOptions, Teacher, summed_loss, train_step, without_silent_tail
from tests.tiny import LLAMA

SPEC = dataclasses.replace(LLAMA, vocab_size=31)
SMALLER = dataclasses.replace(SPEC, hidden_size=8, num_layers=1)
KEY = jax.random.key(3)
ALL = np.ones(4, bool)
TX = optax.sgd(0.1)
Tree = dict[str, Any]


def plain_divergence(logits: jax.Array, goal: jax.Array, weights: Any) -> jax.Array:
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(goal)
    return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


@pytest.mark.parametrize("taught", [0, 7, 1000])
def test_the_divergence_and_its_gradient_are_those_of_the_formula(taught: int) -> None:
    """Of none, of some in one chunk and of some in several chunks of the positions; the teacher is of another width."""
    rng = np.random.default_rng(0)
    hidden, teacher = (jnp.asarray(rng.standard_normal((4, 300, n)), jnp.float32) for n in (6, 5))
    head, teacher_head = (jnp.asarray(2 * rng.standard_normal((11, n)), jnp.float32) for n in (6, 5))
    weights = np.zeros(1200, np.float32)
    weights[rng.permutation(1200)[:taught]] = rng.random(taught).astype(np.float32) + 0.1
    weights = weights.reshape(4, 300)
    # What nobody reads may be anything.
    teacher = jnp.where(weights[..., None] > 0, teacher, jnp.nan)

    def ours(hidden: jax.Array) -> jax.Array:
        return divergence(hidden, head, teacher, teacher_head, weights)

    def plain(hidden: jax.Array) -> jax.Array:
        goal = jnp.where(weights[..., None] > 0, teacher, 0.0) @ teacher_head.T
        return plain_divergence(hidden @ head.T, goal, weights)

    value, gradient = jax.jit(jax.value_and_grad(ours))(hidden)
    expected, expected_gradient = jax.value_and_grad(plain)(hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    largest = float(jnp.max(jnp.abs(expected_gradient)))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-5 * largest)
    assert (largest > 0) == (taught > 0)


def test_a_model_does_not_diverge_from_itself() -> None:
    hidden = jax.random.normal(KEY, (2, 5, 6))
    head = jax.random.normal(jax.random.key(1), (9, 6))
    value, gradient = jax.value_and_grad(divergence)(hidden, head, hidden, head, jnp.ones((2, 5)))
    assert abs(float(value)) < 1e-5
    assert float(jnp.max(jnp.abs(gradient))) < 1e-6


@pytest.fixture(scope="module")
def batch() -> Tree:
    """Three rows of 29, 9 and 2 inputs, of which 5, 3 and 1 carry a label."""
    rng = np.random.default_rng(4)
    rows = [
        Tokenized(rng.integers(0, 31, n).astype(np.int32), np.arange(n) >= n - k) for n, k in ((30, 5), (10, 3), (3, 1))
    ]
    return pad_batch([*rows, rows[0]], 4, 32)


def test_the_teacher_teaches_real_tokens_without_a_label(batch: Tree) -> None:
    taught = np.asarray(taught_weights(batch, KEY, 0.5, 1.0, ALL))
    real = np.arange(32) < batch["lengths"][:, None]
    np.testing.assert_array_equal(taught > 0, real & (batch["weights"] == 0))
    labels = batch["weights"].sum()
    np.testing.assert_allclose(taught.sum() / labels, 0.5, rtol=1e-6)
    assert len(np.unique(taught)) == 2


def test_a_share_of_them_is_drawn_anew_for_every_key(batch: Tree) -> None:
    whole = np.asarray(taught_weights(batch, KEY, 1.0, 1.0, ALL)) > 0
    draws = [np.asarray(taught_weights(batch, jax.random.key(seed), 1.0, 0.5, ALL)) for seed in range(40)]
    assert all(not np.any((draw > 0) & ~whole) for draw in draws)
    np.testing.assert_allclose([draw.sum() for draw in draws], batch["weights"].sum(), rtol=1e-5)
    # Of rows of 24, 6, 1 and 24 such tokens; of the longest every token now and then.
    for draw in draws:
        np.testing.assert_array_equal(np.sum(draw > 0, axis=1), [12, 3, 1, 12])
    shares = np.mean([draw[0] > 0 for draw in draws], axis=0)
    np.testing.assert_allclose(shares[whole[0]], 0.5, atol=0.35)
    assert np.any((draws[0] > 0) != (draws[1] > 0))


def test_a_share_rounds_up_to_whole_tokens() -> None:
    """0.07 of 100 are 7, though float32 has it above."""
    rows = {"tokens": jnp.ones((1, 100), jnp.int32), "lengths": jnp.asarray([100]), "weights": jnp.zeros((1, 100))}
    found = [int(jnp.sum(taught_weights(rows, KEY, 1.0, share, ALL[:1]) > 0)) for share in (0.001, 0.07, 0.071, 0.999)]
    assert found == [1, 7, 8, 100]


def test_the_teacher_may_read_the_first_positions_of_its_rows(batch: Tree) -> None:
    """Half of 32; what it does not read it does not teach."""
    whole = np.asarray(taught_weights(batch, KEY, 1.0, 1.0, ALL)) > 0
    half = np.asarray(taught_weights(batch, KEY, 1.0, 1.0, ALL, 0.5)) > 0
    assert np.any(whole[:, 16:])
    np.testing.assert_array_equal(half, whole & (np.arange(32) < 16))
    assert [positions_read(share, 32) for share in (0.01, 0.51, 1.0)] == [1, 17, 32]
    assert [positions_read(share, 1024) for share in (0.01, 0.5, 0.51, 1.0)] == [128, 512, 640, 1024]


def rows_of(labels: list[int], lengths: list[int]) -> Tree:
    """Rows of 8 tokens, the first `labels` of which are labels."""
    weights = (np.arange(8) < np.asarray(labels)[:, None]).astype(np.float32)
    return {"weights": jnp.asarray(weights), "lengths": jnp.asarray(lengths)}


def test_rows_without_labels_are_read_before_others_and_empty_ones_last() -> None:
    rows = rows_of([3, 0, 2, 0, 1, 0], [8, 8, 8, 8, 8, 0])
    reads = np.asarray([taught_rows(rows, jax.random.key(seed), 0.5, 1) for seed in range(60)])
    assert np.all(reads.sum(axis=1) == 3)
    assert np.all(reads[:, [1, 3]]) and not np.any(reads[:, 5])
    np.testing.assert_allclose(reads[:, [0, 2, 4]].mean(axis=0), 1 / 3, atol=0.2)


def test_of_unlike_shares_the_next_whole_number_of_rows_is_read() -> None:
    rows = rows_of([1] * 100, [8] * 100)
    counts = [int(np.sum(taught_rows(rows, KEY, share, 1))) for share in (0.005, 0.07, 0.071, 1.0)]
    assert counts == [1, 7, 8, 100]


def test_every_micro_batch_has_its_share_of_rows_to_read() -> None:
    """Rows take turns in micro-batches, so all without labels may be in one."""
    rows = rows_of([0, 5] * 4, [8] * 8)
    read = np.asarray(taught_rows(rows, KEY, 0.5, 2)).reshape(4, 2)
    np.testing.assert_array_equal(read.sum(axis=0), [2, 2])


@pytest.fixture(scope="module")
def model() -> tuple[Tree, Any, Tree, Teacher]:
    """A model in the middle of training, its masks, and a smaller teacher."""
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else 5 * leaf, init_params(jax.random.key(0), SPEC))
    fresh = init_lora(jax.random.key(1), params, SPEC, 3)
    lora_b = {name: 0.1 * jax.random.normal(KEY, leaf.shape) for name, leaf in fresh.lora_b.items()}
    rng = np.random.default_rng(2)
    masks = {name: jnp.asarray(rng.random(params["layers"][name].shape) < 0.5) for name in LINEARS}
    other = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else 5 * leaf, init_params(jax.random.key(5), SMALLER))
    return params, dataclasses.replace(fresh, lora_b=lora_b), masks, Teacher(other, SMALLER)


def test_the_loss_is_that_of_the_labels_plus_the_weighted_mean_divergence(
    model: tuple[Tree, Any, Tree, Teacher], batch: Tree
) -> None:
    params, adapters, masks, teacher = model
    taught = taught_weights(batch, KEY, 0.7, 1.0, ALL)
    whole = {**batch, "taught": taught}
    labels = batch["weights"].sum()

    def plain(arrays: Tree) -> jax.Array:
        moved = dataclasses.replace(adapters, lora_a=arrays["lora_a"], lora_b=arrays["lora_b"])
        logits = forward(params, batch["tokens"], SPEC, moved, masks)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
        goal = forward(teacher.params, batch["tokens"], SMALLER)
        free = (np.asarray(taught) > 0).astype(np.float32)
        return jnp.sum(nll * batch["weights"]) / labels + 0.7 * plain_divergence(logits, goal, free) / free.sum()

    def ours(arrays: Tree) -> tuple[jax.Array, Tree]:
        return summed_loss(arrays, adapters, params, masks, whole, KEY, SPEC, StepOptions(), teacher)

    expected, gradients = jax.jit(jax.value_and_grad(plain))(trainable(adapters))
    (value, sums), found = jax.jit(jax.value_and_grad(ours, has_aux=True))(trainable(adapters))
    np.testing.assert_allclose(value / labels, expected, rtol=1e-5)
    np.testing.assert_allclose(sums["nll"] + sums["divergence"], value, rtol=1e-6)
    for gradient, reference in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        largest = float(jnp.max(jnp.abs(reference)))
        np.testing.assert_allclose(gradient / labels, reference, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("prefix", [1.0, 0.5])
def test_a_teacher_that_reads_a_part_teaches_what_it_would_there(
    model: tuple[Tree, Any, Tree, Teacher], batch: Tree, prefix: float
) -> None:
    """The same loss and gradient as of all rows and positions, whatever it would say where the weight is 0."""
    params, adapters, masks, teacher = model
    read = taught_rows(batch, KEY, 0.5, 1)
    assert int(jnp.sum(read)) == 2
    whole = {**batch, "taught": taught_weights(batch, KEY, 0.7, 1.0, read, prefix)}

    def loss(arrays: Tree, share: float) -> jax.Array:
        options = StepOptions(teacher_row_share=share, teacher_prefix_share=prefix if share < 1 else 1.0)
        return summed_loss(arrays, adapters, params, masks, whole, KEY, SPEC, options, teacher)[0]

    gradient = jax.jit(jax.value_and_grad(loss), static_argnames="share")
    (value, found), (expected, all_rows) = (gradient(trainable(adapters), share=share) for share in (0.5, 1.0))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(all_rows), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(theirs))))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_lies_behind_the_teacher_and_all_labels_is_cut_and_moves_nothing(
    model: tuple[Tree, Any, Tree, Teacher], micro_batches: int
) -> None:
    """Labels in the first half of 32 positions, of which the teacher reads no more; tokens are still counted whole."""
    params, adapters, masks, teacher = model
    rng = np.random.default_rng(6)
    rows = [Tokenized(rng.integers(0, 31, 33).astype(np.int32), (np.arange(33) > 3) & (np.arange(33) < 8))] * 2
    text = [Tokenized(rng.integers(0, 31, 33).astype(np.int32), np.zeros(33, bool))] * 2
    whole = pad_batch([*rows, *text], 4, 32)
    options = StepOptions(micro_batches=micro_batches, teacher_prefix_share=0.5, teacher_row_share=0.5)
    cut, cut_options = without_silent_tail(whole, options)
    assert cut["tokens"].shape == cut["weights"].shape == (4, 16)
    found = []
    for batch, taken in ((whole, options), (cut, cut_options)):
        state = init_train_state(jax.tree.map(jnp.copy, adapters), TX)
        found.append(train_step(state, params, masks, batch, KEY, SPEC, TX, taken, teacher))
    (state, metrics), (cut_state, cut_metrics) = found
    assert float(metrics["divergence"]) > 0.01 and float(metrics["labels"]) == 8
    assert set(metrics) == set(cut_metrics)
    for name, value in metrics.items():
        np.testing.assert_allclose(cut_metrics[name], value, rtol=1e-5, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(cut_state.adapters), jax.tree.leaves(state.adapters), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_nothing_is_cut_where_a_label_follows_or_the_teacher_reads_it(batch: Tree) -> None:
    half = StepOptions(teacher_prefix_share=0.5)
    assert without_silent_tail(batch, half) == (batch, half)
    silent = {**batch, "weights": 0 * batch["weights"]}
    assert without_silent_tail(silent, StepOptions()) == (silent, StepOptions())
    assert without_silent_tail(silent, half)[0]["tokens"].shape == (4, 16)


@pytest.mark.slow
def test_micro_batches_learn_what_one_batch_does(model: tuple[Tree, Any, Tree, Teacher], batch: Tree) -> None:
    params, adapters, masks, teacher = model
    tx = optimizer(TrainConfig(learning_rate=1e-2), 100)
    found = []
    for micro_batches in (1, 2):
        state = init_train_state(jax.tree.map(jnp.copy, adapters), tx)
        options = StepOptions(micro_batches=micro_batches, teacher_weight=0.7)
        found.append(train_step(state, params, masks, batch, KEY, SPEC, tx, options, teacher))
    (whole, metrics), (parts, part_metrics) = found
    for name in ("loss", "divergence", "grad_norm"):
        np.testing.assert_allclose(metrics[name], part_metrics[name], rtol=1e-5)
    assert float(metrics["divergence"]) > 0.01
    for ours, theirs in zip(jax.tree.leaves(whole.adapters), jax.tree.leaves(parts.adapters), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
