"""Exact swaps against an error computed anew, and against the best mask of small rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.pruning.swaps import swap_mask
from tests.pruning.oracles import correlated_inputs

OUT, IN, TOKENS = 10, 12, 60
swap = jax.jit(swap_mask, static_argnames="pattern")


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    """Correlated inputs `[tokens,I]`."""
    return correlated_inputs(3, TOKENS, IN)


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((OUT, IN))


@pytest.fixture(scope="module")
def mask(weight: np.ndarray) -> np.ndarray:
    """Half of every group of four, the largest entries."""
    groups = np.abs(weight).reshape(OUT, -1, 4)
    return (np.argsort(np.argsort(groups, axis=-1), axis=-1) >= 2).reshape(OUT, IN)


def errors(weight: np.ndarray, mask: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    return ((np.where(mask, 0.0, weight) @ inputs.T) ** 2).sum(1)


def swapped(
    weight: np.ndarray,
    mask: np.ndarray,
    inputs: np.ndarray,
    swaps: int,
    pattern: tuple[int, int] | None = None,
) -> np.ndarray:
    gram = jnp.asarray(inputs.T @ inputs, jnp.float32)
    return np.asarray(swap(jnp.asarray(weight, jnp.float32), jnp.asarray(mask), gram, swaps, pattern=pattern))


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_every_swap_lowers_the_error_and_keeps_the_counts(
    weight: np.ndarray, mask: np.ndarray, inputs: np.ndarray, pattern: tuple[int, int] | None
) -> None:
    before = errors(weight, mask, inputs)
    old = mask
    for swaps in range(1, 8):
        new = swapped(weight, mask, inputs, swaps, pattern=pattern)
        now, moved = errors(weight, new, inputs), (new != old).sum(1)
        assert set(moved) <= {0, 2}
        assert (now[moved > 0] < before[moved > 0]).all()
        if pattern:
            assert (new.reshape(OUT, -1, 4).sum(-1) == 2).all()
        before, old = now, new
    assert before.sum() < 0.8 * errors(weight, mask, inputs).sum()


def test_the_swap_taken_is_the_better_of_two_whose_errors_are_computed_anew(
    weight: np.ndarray, mask: np.ndarray, inputs: np.ndarray
) -> None:
    """From the q that is cheapest to lose, and from the p that helps most, each followed by two best answers."""
    new = swapped(weight, mask, inputs, 1)
    for row in range(OUT):

        def after(p: int | None, q: int | None, row: int = row) -> np.ndarray:
            moved = mask[row].copy()
            if q is not None:
                moved[q] = False
            if p is not None:
                moved[p] = True
            return moved

        def error(p: int | None, q: int | None, row: int = row) -> float:
            return float(errors(weight[row : row + 1], after(p, q)[None], inputs)[0])

        kept, pruned = np.flatnonzero(mask[row]), np.flatnonzero(~mask[row])
        cheapest = min(kept, key=lambda q: error(None, q))
        p = min(pruned, key=lambda p: error(p, cheapest))
        one = p, min(kept, key=lambda q: error(p, q))
        helpful = min(pruned, key=lambda p: error(p, None))
        q = min(kept, key=lambda q: error(helpful, q))
        two = min(pruned, key=lambda p: error(p, q)), q
        wanted = min((None, None), one, two, key=lambda pair: error(*pair))
        np.testing.assert_array_equal(new[row], after(*wanted))


def test_a_pattern_ends_where_no_pair_of_a_group_helps(
    weight: np.ndarray, mask: np.ndarray, inputs: np.ndarray
) -> None:
    new = swapped(weight, mask, inputs, 100, pattern=(2, 4))
    best = errors(weight, new, inputs)
    for row, start in itertools.product(range(OUT), range(0, IN, 4)):
        for p, q in itertools.product(range(start, start + 4), repeat=2):
            if new[row, q] and not new[row, p]:
                other = new[row].copy()
                other[p], other[q] = True, False
                assert errors(weight[row : row + 1], other[None], inputs)[0] >= best[row] * (1 - 1e-4)


def test_rows_end_near_the_best_mask_of_all(weight: np.ndarray, mask: np.ndarray, inputs: np.ndarray) -> None:
    found = errors(weight, swapped(weight, mask, inputs, 50), inputs)
    for row in range(OUT):
        kept = int(mask[row].sum())
        masks = np.array([np.isin(np.arange(IN), chosen) for chosen in itertools.combinations(range(IN), kept)])
        best = errors(np.broadcast_to(weight[row], masks.shape), masks, inputs).min()
        assert found[row] >= best * (1 - 1e-4)
        assert found[row] <= 3 * best


def test_rows_without_a_choice_and_silent_inputs_stay(weight: np.ndarray, inputs: np.ndarray) -> None:
    mask = np.zeros((OUT, IN), bool)
    mask[::2] = True
    np.testing.assert_array_equal(swapped(weight, mask, inputs, 5), mask)
    half = np.arange(IN) % 2 == 0
    mask = np.broadcast_to(half, (OUT, IN))
    np.testing.assert_array_equal(swapped(weight, mask, np.zeros_like(inputs), 5), mask)
