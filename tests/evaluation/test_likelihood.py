"""Rows scored a few at a time."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.evaluation.likelihood import score_rows

Array = jax.Array
Score = Callable[[Mapping[str, Array]], Array]


@pytest.mark.parametrize(
    ("rows", "length", "at_once"),
    [(12, 100, 6), (7, 90, 7), (7, 100, 1), (3, 2000, 1)],
    ids=["a divisor that fits", "all", "no divisor but one fits", "longer than what fits"],
)
def test_on_a_cpu_so_many_rows_are_scored_at_once_as_its_caches_hold(rows: int, length: int, at_once: int) -> None:
    scored, score = recorder()
    batch = example(rows, length)
    np.testing.assert_array_equal(score_rows(score, batch, None), batch["tokens"].sum(1) + batch["weights"])
    assert scored == [(at_once, length)]


def test_a_model_with_masks_scores_all_rows_at_once() -> None:
    scored, score = recorder()
    score_rows(score, example(12, 100), {"q_proj": jnp.ones((1, 2, 2), bool)})
    assert scored == [(12, 100)]


def recorder() -> tuple[list[tuple[int, ...]], Score]:
    """The shapes that were scored, and a score: a row's sum."""
    shapes: list[tuple[int, ...]] = []

    def score(batch: Mapping[str, Array]) -> Array:
        shapes.append(batch["tokens"].shape)
        return batch["tokens"].sum(1) + batch["weights"]

    return shapes, score


def example(rows: int, length: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "tokens": jnp.asarray(rng.integers(0, 9, (rows, length))),
        "weights": jnp.asarray(rng.integers(0, 9, rows)),
    }
