"""Decoding with a cache is decoding without one, only faster; what a row gets depends on no other row."""

from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.lora import Adapters, init_lora, merge
from efx_jax.model.decoder import forward
from efx_jax.model.generate import generate
from efx_jax.model.sampling import Sampling
from efx_jax.model.spec import LINEARS, ModelSpec, init_params, spec_from_config
from tests.quick import quick_compilation
from tests.tiers import few_of

PROMPT, NEW = 6, 7
LENGTHS = np.asarray([6, 1, 4], np.int32)
jitted_forward = jax.jit(forward, static_argnames=("spec",))


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def tiny_spec(model_type: str) -> ModelSpec:
    config = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "model_type": model_type}
    return spec_from_config(config)


def random_params(spec: ModelSpec) -> dict[str, Any]:
    return jax.tree.map(lambda x: x * (15 if x.ndim > 1 else 1), init_params(jax.random.key(1), spec))


def prompts(spec: ModelSpec) -> np.ndarray:
    return np.random.default_rng(0).integers(0, spec.vocab_size, (len(LENGTHS), PROMPT)).astype(np.int32)


def without_cache(params: Any, spec: ModelSpec, *changes: Any) -> np.ndarray:
    """Runs `forward` on the whole sequence for every new token."""
    tokens = np.zeros((len(LENGTHS), PROMPT + NEW), np.int32)
    tokens[:, :PROMPT] = prompts(spec)
    rows = np.arange(len(LENGTHS))
    for step in range(NEW):
        logits = np.asarray(jitted_forward(params, tokens, spec, *changes))
        tokens[rows, LENGTHS + step] = logits[rows, LENGTHS + step - 1].argmax(-1)
    return np.stack([tokens[row, length : length + NEW] for row, length in enumerate(LENGTHS)])


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> tuple[Any, ModelSpec, np.ndarray]:
    spec = tiny_spec(request.param)
    params = random_params(spec)
    return params, spec, without_cache(params, spec)


def test_cached_tokens_equal_those_of_forward_on_ragged_prompts(model: Any) -> None:
    params, spec, expected = model
    found = np.asarray(generate(params, prompts(spec), LENGTHS, spec, NEW))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 5


def test_padding_tokens_are_never_read(model: Any) -> None:
    params, spec, expected = model
    padding = np.arange(PROMPT) >= LENGTHS[:, None]
    other = np.where(padding, spec.vocab_size - 1 - prompts(spec), prompts(spec))
    np.testing.assert_array_equal(generate(params, other, LENGTHS, spec, NEW), expected)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_row_ends_with_its_stop_token(model: Any) -> None:
    params, spec, expected = model
    stop = (int(expected[0, 2]), int(expected[1, 4]))
    found = np.asarray(generate(params, prompts(spec), LENGTHS, spec, NEW, stop_tokens=stop))
    for row, unstopped in zip(found, expected, strict=True):
        hits = np.flatnonzero(np.isin(unstopped, stop))
        end = hits[0] + 1 if hits.size else NEW
        np.testing.assert_array_equal(row[:end], unstopped[:end])
        assert (row[end:] == -1).all()
    assert (found == -1).any()


def test_all_rows_may_stop_at_once() -> None:
    spec = tiny_spec("llama")
    every = tuple(range(spec.vocab_size))
    found = np.asarray(generate(random_params(spec), prompts(spec), LENGTHS, spec, NEW, stop_tokens=every))
    assert (found[:, 0] >= 0).all() and (found[:, 1:] == -1).all()


def test_adapters_and_masks_act_as_in_forward() -> None:
    spec = tiny_spec("llama")
    params = random_params(spec)
    adapters: Adapters = init_lora(jax.random.key(2), params, spec, rank=2)
    adapters = adapters.replace(lora_b=jax.tree.map(lambda b: b + 0.3, adapters.lora_b))
    masks = {name: jnp.abs(params["layers"][name]) > 0.1 for name in LINEARS}
    found = generate(params, prompts(spec), LENGTHS, spec, NEW, adapters, masks)
    np.testing.assert_array_equal(found, without_cache(params, spec, adapters, masks))
    np.testing.assert_array_equal(found, generate(merge(params, adapters, masks), prompts(spec), LENGTHS, spec, NEW))
    assert (np.asarray(found) != np.asarray(generate(params, prompts(spec), LENGTHS, spec, NEW))).any()


def test_bfloat16_operands_and_cache_run() -> None:
    spec = tiny_spec("llama")
    found = generate(random_params(spec), prompts(spec), LENGTHS, spec, NEW, compute_dtype="bfloat16")
    assert found.shape == (len(LENGTHS), NEW) and (np.asarray(found) >= 0).all()


def test_generate_is_traced_once_per_shape() -> None:
    spec = tiny_spec("llama")
    params = random_params(spec)
    once = chex.assert_max_traces(generate.__wrapped__, n=1)
    counted = jax.jit(once, static_argnames=("spec", "max_new_tokens"))
    for lengths in (LENGTHS, LENGTHS[::-1].copy()):
        counted(params, prompts(spec), lengths, spec, 2)
    with pytest.raises(AssertionError, match="traced"):
        counted(params, prompts(spec), LENGTHS, spec, 3)


def test_no_new_tokens_is_refused() -> None:
    spec = tiny_spec("llama")
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, found 0"):
        generate(random_params(spec), prompts(spec), LENGTHS, spec, 0)


def left_padded() -> np.ndarray:
    spec = tiny_spec("llama")
    rows = [np.roll(row, PROMPT - length) for row, length in zip(prompts(spec), LENGTHS, strict=True)]
    return np.stack(rows)


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.9, top_k=20, top_p=0.9)])
def test_padding_on_the_left_gives_the_same_tokens(sampling: Sampling | None) -> None:
    spec = tiny_spec("llama")
    key = None if sampling is None else jax.random.key(5)
    params, how = random_params(spec), {"sampling": sampling, "key": key}
    right = generate(params, prompts(spec), LENGTHS, spec, NEW, **how)
    left = generate(params, left_padded(), LENGTHS, spec, NEW, padding="left", **how)
    np.testing.assert_array_equal(left, right)
    assert (left_padded() != prompts(spec)).any()


def test_a_sampled_row_does_not_depend_on_its_batch_or_padding() -> None:
    spec = tiny_spec("llama")
    params, how = random_params(spec), {"sampling": Sampling(0.9, 30, 0.95), "key": jax.random.key(5)}
    streams = np.asarray([7, 3, 11], np.int32)
    together = np.asarray(generate(params, prompts(spec), LENGTHS, spec, NEW, rows=streams, **how))
    for row, length in enumerate(LENGTHS):
        padded = np.full((2, PROMPT + 3), 9, np.int32)
        padded[1, :length] = prompts(spec)[row, :length]
        rows = np.asarray([20, streams[row]], np.int32)
        alone = generate(params, padded, np.asarray([1, length]), spec, NEW, rows=rows, **how)
        np.testing.assert_array_equal(alone[1], together[row])
    again = np.asarray(generate(params, prompts(spec), LENGTHS, spec, NEW, rows=streams + 1, **how))
    assert (again != together).any(axis=1).all()


@pytest.mark.slow
@pytest.mark.parametrize("sampling", few_of([None, Sampling(temperature=1.0)], Sampling(temperature=1.0)))
def test_rows_of_a_long_answer_do_not_notice_that_others_leave_the_batch(sampling: Sampling | None) -> None:
    spec, new, count = tiny_spec("llama"), 128, 32
    params = random_params(spec)
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, spec.vocab_size, (count, PROMPT)).astype(np.int32)
    lengths = rng.integers(1, PROMPT + 1, count).astype(np.int32)

    def answers(rows: slice, runs: int = 1) -> np.ndarray:
        keys = jax.random.split(jax.random.key(5), 2)[:runs] if sampling else None
        numbers = jnp.arange(count)[rows]
        found = generate(
            params,
            tokens[rows],
            lengths[rows],
            spec,
            new,
            stop_tokens=(7, 8, 9),
            sampling=sampling,
            key=keys,
            rows=numbers,
        )
        return np.asarray(found).reshape(runs, -1, new)

    together = answers(slice(0, count), 2 if sampling else 1)
    written = np.sort((together[0] >= 0).sum(axis=1))
    assert written[8] < written[-8] and written[0] < written[16] < new
    # Eight rows are never fewer.
    alone = np.concatenate([answers(slice(first, first + 8)) for first in range(0, count, 8)], axis=1)
    np.testing.assert_array_equal(together[0], alone[0])


@pytest.mark.slow
def test_several_keys_answer_as_each_alone_does() -> None:
    spec = tiny_spec("llama")
    params, way = random_params(spec), Sampling(0.9, 30, 0.95)
    keys = jax.random.split(jax.random.key(5), 3)
    stop = (int(np.asarray(generate(params, prompts(spec), LENGTHS, spec, NEW, sampling=way, key=keys[0]))[1, 2]),)
    how = {"sampling": way, "stop_tokens": stop}
    together = np.asarray(generate(params, prompts(spec), LENGTHS, spec, NEW, key=keys, **how))
    assert together.shape == (3, len(LENGTHS), NEW) and (together == -1).any()
    for run, key in zip(together, keys, strict=True):
        np.testing.assert_array_equal(run, generate(params, prompts(spec), LENGTHS, spec, NEW, key=key, **how))


def test_sampling_one_candidate_is_greedy(model: Any) -> None:
    params, spec, expected = model
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-4)):
        found = generate(params, prompts(spec), LENGTHS, spec, NEW, sampling=sampling, key=jax.random.key(0))
        np.testing.assert_array_equal(found, expected)


def test_sampled_tokens_follow_the_model() -> None:
    """The first and the second token of 4,000 rows with one prompt, against the model's probabilities."""
    spec, rows = tiny_spec("llama"), 4000
    params = jax.tree.map(lambda x: x / (4 if x.ndim > 1 else 1), random_params(spec))
    tokens = np.tile(prompts(spec)[:1], (rows, 1))
    lengths = np.full(rows, PROMPT)
    found = np.asarray(generate(params, tokens, lengths, spec, 2, sampling=Sampling(), key=jax.random.key(1)))
    first = np.asarray(jax.nn.softmax(jitted_forward(params, tokens[:1], spec)[0, -1]))
    behind = np.concatenate([np.tile(tokens[:1], (spec.vocab_size, 1)), np.arange(spec.vocab_size)[:, None]], axis=1)
    second = first @ np.asarray(jax.nn.softmax(jitted_forward(params, behind.astype(np.int32), spec)[:, -1]))
    for column, probabilities in enumerate((first, second)):
        frequencies = np.bincount(found[:, column], minlength=spec.vocab_size) / rows
        errors = np.sqrt(probabilities * (1 - probabilities) / rows)
        assert (np.abs(frequencies - probabilities) < 4.5 * errors + 1e-9).all()
        assert 0.02 < probabilities.max() < 0.5


def test_a_key_and_a_way_of_sampling_come_together() -> None:
    spec = tiny_spec("llama")
    with pytest.raises(InputError, match="expected sampling and key together"):
        generate(random_params(spec), prompts(spec), LENGTHS, spec, NEW, sampling=Sampling())
