"""Exact counts and a defined order among ties, against NumPy's stable sort."""

from fractions import Fraction
from math import ceil, floor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efx_jax.errors import InputError
from efx_jax.pruning.selection import drop_count, select_mask

SHAPE = (8, 16)
SPARSITIES = ("0", "0.3", "0.5", "0.999")


def score_families(rows: int, columns: int) -> dict[str, np.ndarray]:
    """Float32 scores `[O,I]` of every kind that has ever broken a selection by threshold."""
    rng = np.random.default_rng(0)
    uniform = rng.random((rows, columns), dtype=np.float32)
    return {
        "uniform": uniform,
        "all equal": np.full_like(uniform, 0.25),
        "60 % zeros": np.where(rng.random(uniform.shape) < 0.6, np.float32(0), uniform),
        "signed zeros": np.where(rng.random(uniform.shape) < 0.5, np.float32(-0.0), np.float32(0)),
        "bf16": uniform.astype(ml_dtypes.bfloat16).astype(np.float32),
        "subnormal": (rng.integers(0, 40, uniform.shape) * np.float64(2.0**-149)).astype(np.float32),
        "e^+-60": np.exp(rng.uniform(-60, 60, uniform.shape)).astype(np.float32),
        "rows apart": uniform * np.exp(rng.uniform(-6, 6, (rows, 1))).astype(np.float32),
        "below 0": uniform - np.float32(0.5),
        "few levels": rng.integers(0, 3, uniform.shape).astype(np.float32),
    }


FAMILIES = score_families(*SHAPE)
STACKED = np.stack(list(FAMILIES.values()))
select_all = jax.jit(jax.vmap(select_mask, in_axes=(0, None, None, None)), static_argnums=(1, 2, 3))


def lowest_by_sort(scores: np.ndarray, count: int) -> np.ndarray:
    """Marks the `count` smallest of the last axis, the lower index first among equals."""
    marked = np.zeros(scores.shape, bool)
    np.put_along_axis(marked, np.argsort(scores, axis=-1, kind="stable")[..., :count], True, axis=-1)
    return marked


def keep_bounded(score: np.ndarray, sparsity: Fraction, bound: Fraction) -> np.ndarray:
    """The design's definition, one entry at a time."""
    rows, columns = score.shape
    total = floor(sparsity * rows * columns)
    surely = max(0, floor((sparsity - bound) * columns))
    at_most = min(columns, ceil((sparsity + bound) * columns))
    keep = np.ones(score.shape, bool)
    contested = []
    for row in range(rows):
        ranked = sorted(range(columns), key=lambda column: (score[row, column], column))
        for column in ranked[:surely]:
            keep[row, column] = False
            total -= 1
        contested += [(score[row, column], row, column) for column in ranked[surely:at_most]]
    for _, row, column in sorted(contested)[:total]:
        keep[row, column] = False
    return keep


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_rows_equal_a_stable_sort(sparsity: str) -> None:
    kept = np.asarray(select_all(STACKED, float(sparsity), "row", None))
    expected = ~lowest_by_sort(STACKED, floor(Fraction(sparsity) * SHAPE[1]))
    for name, got, wanted in zip(FAMILIES, kept, expected, strict=True):
        np.testing.assert_array_equal(got, wanted, err_msg=name)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_matrix_equals_a_stable_sort(sparsity: str) -> None:
    kept = np.asarray(select_all(STACKED, float(sparsity), "matrix", None))
    flat = STACKED.reshape(len(STACKED), -1)
    expected = ~lowest_by_sort(flat, floor(Fraction(sparsity) * flat.shape[1])).reshape(STACKED.shape)
    for name, got, wanted in zip(FAMILIES, kept, expected, strict=True):
        np.testing.assert_array_equal(got, wanted, err_msg=name)


@pytest.mark.parametrize(("keep", "of"), [(1, 4), (2, 4), (4, 8)])
def test_a_pattern_equals_a_stable_sort_of_every_block(keep: int, of: int) -> None:
    kept = np.asarray(select_all(STACKED, 1 - keep / of, f"{keep}:{of}", None))
    blocks = STACKED.reshape(len(STACKED), SHAPE[0], -1, of)
    expected = ~lowest_by_sort(blocks, of - keep).reshape(STACKED.shape)
    for name, got, wanted in zip(FAMILIES, kept, expected, strict=True):
        np.testing.assert_array_equal(got, wanted, err_msg=name)
    assert (kept.reshape(blocks.shape).sum(-1) == keep).all()


@pytest.mark.parametrize("columns", [128, 256, 300])
def test_a_slab_of_128_inputs_equals_a_stable_sort_of_its_rows(columns: int) -> None:
    scores = np.stack(list(score_families(3, columns).values()))
    kept = np.asarray(select_all(scores, 0.3, "slab", None))
    for first in range(0, columns, 128):
        slab = slice(first, first + 128)
        flat = scores[..., slab].reshape(len(scores), -1)
        expected = ~lowest_by_sort(flat, floor(Fraction("0.3") * flat.shape[1])).reshape(scores[..., slab].shape)
        for name, got, wanted in zip(FAMILIES, kept[..., slab], expected, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=name)


@pytest.mark.parametrize(
    ("sparsity", "bound"), [("0", "0.2"), ("0.3", "0.1"), ("0.5", "0.2"), ("0.5", "0"), ("0.5", "1"), ("0.999", "0.3")]
)
def test_bounded_rows_equal_the_definition_entry_by_entry(sparsity: str, bound: str) -> None:
    kept = np.asarray(select_all(STACKED, float(sparsity), "bounded", float(bound)))
    for name, got, score in zip(FAMILIES, kept, STACKED, strict=True):
        wanted = keep_bounded(score, Fraction(sparsity), Fraction(bound))
        np.testing.assert_array_equal(got, wanted, err_msg=name)
    assert ((~kept).sum((1, 2)) == floor(Fraction(sparsity) * SHAPE[0] * SHAPE[1])).all()


def test_bounded_lies_between_row_and_matrix() -> None:
    score = FAMILIES["rows apart"][None]
    row, matrix = select_all(score, 0.5, "row", None), select_all(score, 0.5, "matrix", None)
    assert not np.array_equal(row, matrix)
    np.testing.assert_array_equal(select_all(score, 0.5, "bounded", 0.0), row)
    np.testing.assert_array_equal(select_all(score, 0.5, "bounded", 1.0), matrix)


@pytest.mark.parametrize("entries", [1, 7, 16, 100, 576, 768, 4096, 11008, 4096 * 4096, 5120 * 17408])
def test_counts_are_the_floor_of_the_decimal_share(entries: int) -> None:
    for thousandth in range(1000):
        exact = floor(Fraction(thousandth, 1000) * entries)
        assert drop_count(thousandth / 1000, entries) == exact, thousandth
    assert drop_count(1 - 1e-12, entries) == entries - 1


@pytest.mark.parametrize(("group", "bound"), [("row", None), ("matrix", None), ("bounded", 0.2), ("2:4", None)])
def test_eight_devices_draw_the_same_mask(group: str, bound: float | None) -> None:
    assert jax.device_count() >= 8, "tests/conftest.py simulates eight devices"
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("rows", "columns"))
    sharding = NamedSharding(mesh, PartitionSpec(None, "rows", "columns"))
    alone = select_all(STACKED, 0.5, group, bound)
    spread = select_all(jax.device_put(STACKED, sharding), 0.5, group, bound)
    np.testing.assert_array_equal(spread, alone)


def test_the_layer_axis_alone_may_be_sharded() -> None:
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("layers",))
    layers = jax.device_put(STACKED[:8], NamedSharding(mesh, PartitionSpec("layers")))
    np.testing.assert_array_equal(select_all(layers, 0.5, "bounded", 0.2), select_all(STACKED[:8], 0.5, "bounded", 0.2))


def test_without_jit_the_mask_is_the_same() -> None:
    score = FAMILIES["few levels"]
    np.testing.assert_array_equal(select_mask(score, 0.5, "matrix"), select_all(score[None], 0.5, "matrix", None)[0])


def test_what_is_no_number_counts_as_the_highest_score() -> None:
    score = jnp.asarray([[jnp.nan, 1, -jnp.nan, jnp.inf], [-1, jnp.nan, -jnp.inf, 0]])
    np.testing.assert_array_equal(select_mask(score, 0.5), [[True, False, True, False], [False, True, False, True]])


@pytest.mark.parametrize("group", ["row", "bounded", "2:4"])
def test_nothing_goes_at_a_sparsity_of_0(group: str) -> None:
    assert np.all(select_mask(FAMILIES["uniform"], 0.0, group, 0.0))


def test_scores_of_several_matrices_are_refused() -> None:
    with pytest.raises(InputError, match="expected the scores \\[O,I\\] of one matrix, found .*; use jax.vmap"):
        select_mask(STACKED, 0.5, "bounded", 0.1)


@pytest.mark.parametrize(
    ("sparsity", "group", "bound", "complaint"),
    [
        (1.0, "row", None, "sparsity: expected a value in \\[0, 1\\)"),
        (-0.1, "row", None, "sparsity: expected a value in \\[0, 1\\)"),
        (float("nan"), "row", None, "sparsity: expected a value in \\[0, 1\\)"),
        (0.4, "2:4", None, "group 2:4: expected sparsity 0.5 or 0, found 0.4"),
        (0.4, "3:5", None, "divisible by 5, found 16"),
        (0.0, "3:5", None, "divisible by 5, found 16"),
        (0.5, "column", None, "expected row, matrix, slab, bounded or N:M"),
        (0.5, "4:2", None, "expected row, matrix, slab, bounded or N:M"),
        (0.5, "0:4", None, "expected row, matrix, slab, bounded or N:M"),
        (0.5, "bounded", None, "expected a bound of at least 0, found None"),
        (0.5, "bounded", -0.1, "expected a bound of at least 0, found -0.1"),
    ],
)
def test_what_cannot_be_selected_is_refused_with_one_line(
    sparsity: float, group: str, bound: float | None, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        select_mask(FAMILIES["uniform"], sparsity, group, bound)
    assert "\n" not in str(caught.value)


def test_a_sparsity_of_any_precision_counts_as_it_is_written() -> None:
    assert {drop_count(value, 10) for value in (0.7, np.float32(0.7), np.float64(0.7), jnp.float32(0.7))} == {7}
