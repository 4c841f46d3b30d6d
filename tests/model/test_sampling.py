"""The tokens that may be drawn, and how often they are, against NumPy on the whole distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.model.sampling import Sampling, candidate_logits, draw, most_likely

WAYS = [
    Sampling(),
    Sampling(temperature=0.9, top_k=50, top_p=0.9),
    Sampling(temperature=2.0, top_k=7),
    Sampling(temperature=0.5, top_p=0.6),
    Sampling(top_k=300, top_p=0.05),
    Sampling(top_p=1e-9),
]


def random_logits(rows: int = 40, vocabulary: int = 200) -> np.ndarray:
    return (3 * np.random.default_rng(0).standard_normal((rows, vocabulary))).astype(np.float32)


def oracle(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities of one row, in float64 and token by token."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = list(np.argsort(-scaled, kind="stable"))[: sampling.top_k or None]
    mass = np.exp(scaled[order] - scaled[order].max())
    mass /= mass.sum()
    probabilities, total = np.zeros(len(logits)), 0.0
    for token, share in zip(order, mass, strict=True):
        if total >= sampling.top_p:
            break
        probabilities[token] = share
        total += share
    return probabilities / total


@pytest.mark.parametrize("sampling", WAYS)
def test_the_candidates_are_those_of_the_definition(sampling: Sampling) -> None:
    logits = random_logits()
    candidates, tokens = (np.asarray(array) for array in candidate_logits(jnp.asarray(logits), sampling))
    assert candidates.shape == tokens.shape == (len(logits), min(sampling.top_k or 200, 200))
    for row in range(len(logits)):
        found = np.zeros(logits.shape[1])
        found[tokens[row]] = np.asarray(jax.nn.softmax(candidates[row]))
        expected = oracle(logits[row], sampling)
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-9)


def test_the_token_that_crosses_the_sum_stays_and_the_next_one_goes() -> None:
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25]]))
    for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.74, {1, 3}), (0.76, {1, 2, 3}), (0.95, {0, 1, 2, 3})):
        candidates, tokens = candidate_logits(logits, Sampling(top_p=top_p))
        assert set(np.asarray(tokens)[np.isfinite(candidates)].tolist()) == kept


@pytest.mark.parametrize("sampling", WAYS[:4])
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    logits, draws = random_logits(1, 30), 20_000
    keys = jax.random.split(jax.random.key(3), draws)
    repeated = jnp.broadcast_to(jnp.asarray(logits), (draws, 30))
    drawn = np.asarray(draw(keys, jnp.int32(4), repeated, sampling))
    expected = oracle(logits[0], sampling)
    frequencies = np.bincount(drawn, minlength=30) / draws
    assert (frequencies[expected == 0] == 0).all()
    assert (np.abs(frequencies - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_draws_differ_between_rows_steps_and_keys_and_repeat_themselves() -> None:
    logits = jnp.zeros((64, 1000))

    def tokens(seed: int, step: int) -> list[int]:
        keys = jax.random.split(jax.random.key(seed), 64)
        return np.asarray(draw(keys, jnp.int32(step), logits, Sampling())).tolist()

    assert tokens(0, 0) == tokens(0, 0)
    assert len(set(tokens(0, 0))) > 50
    assert sum(a == b for a, b in zip(tokens(0, 0), tokens(0, 1), strict=True)) < 4
    assert sum(a == b for a, b in zip(tokens(0, 0), tokens(1, 0), strict=True)) < 4


def test_of_equal_logits_the_lowest_token_is_the_most_likely() -> None:
    assert most_likely(jnp.asarray([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_a_setting_that_draws_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="sampling: expected a temperature above 0"):
        Sampling(**wrong)  # type: ignore[arg-type]
