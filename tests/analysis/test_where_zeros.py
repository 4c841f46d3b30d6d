"""Zeros, masks and moved weights counted again by hand."""

import numpy as np
import pytest

from efx_jax.analysis.where import mask_changes, matrix_sparsities, weight_moves
from efx_jax.errors import InputError
from efx_jax.masks import pack_mask


def packed(mask: np.ndarray) -> np.ndarray:
    return np.asarray(pack_mask(mask))


def test_zeros_rows_and_columns_are_counted() -> None:
    weight = np.asarray([[[1.0, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 5]]])
    (found,) = matrix_sparsities({"q_proj": weight, "input_layernorm": np.ones((1, 4))})
    assert (found.layer, found.matrix, found.entries) == (0, "q_proj", 12)
    assert found.sparsity == 7 / 12
    assert (found.row_least, found.row_most) == (0.25, 1.0)
    assert (found.empty_rows, found.empty_columns) == (1, 1)


@pytest.mark.parametrize("width", [8, 13])
def test_shares_of_masks_are_those_of_their_entries(width) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.random((2, 6, width)) < share for share in (0.7, 0.4))
    found = list(mask_changes({"up_proj": packed(first)}, {"up_proj": packed(second)}, {"up_proj": width}, ("a", "b")))
    assert [(each.layer, each.first, each.second, each.entries) for each in found] == [
        (layer, "a", "b", 6 * width) for layer in (0, 1)
    ]
    for each, one, other in zip(found, first, second, strict=True):
        assert each.kept == pytest.approx(other[one].mean())
        assert each.pruned == pytest.approx((~other)[~one].mean())
        assert each.first_kept == one.mean()
        shared, chance = (one & other).mean(), one.mean() * other.mean()
        expected = (shared - chance) / (min(one.mean(), other.mean()) - chance)
        assert each.beyond_chance == pytest.approx(expected)
        assert each.random_kept == pytest.approx(other.mean())
        assert each.random_pruned == pytest.approx((~other).mean())


def test_the_same_mask_agrees_beyond_all_chance_and_random_masks_by_chance() -> None:
    rng = np.random.default_rng(1)
    masks = [{"q_proj": packed(rng.permuted(np.tile([True, False], (1, 200, 100)), axis=2))} for _ in range(2)]
    (same,) = mask_changes(masks[0], masks[0], {"q_proj": 200}, ("a", "b"))
    (random,) = mask_changes(*masks, {"q_proj": 200}, ("a", "b"))
    assert (same.kept, same.pruned, same.beyond_chance) == (1.0, 1.0, 1.0)
    assert abs(random.beyond_chance) < 0.03
    fewer = {"q_proj": masks[0]["q_proj"] & masks[1]["q_proj"]}
    for pair in ((masks[0], fewer), (fewer, masks[0])):
        (nested,) = mask_changes(*pair, {"q_proj": 200}, ("a", "b"))
        assert nested.beyond_chance == pytest.approx(1)
    nothing_goes = {"q_proj": packed(np.ones((1, 2, 8), bool))}
    (whole,) = mask_changes(nothing_goes, nothing_goes, {"q_proj": 8}, ("a", "b"))
    assert whole.pruned is None and whole.beyond_chance is None


def test_masks_of_other_models_are_refused() -> None:
    one, other = ({"q_proj": packed(np.ones((1, rows, 8), bool))} for rows in (2, 3))
    with pytest.raises(InputError, match=r"masks of q_proj are \[1, 2, 1\] and \[1, 3, 1\]"):
        list(mask_changes(one, other, {"q_proj": 8}, ("a", "b")))
    with pytest.raises(InputError, match="no matrix in common"):
        list(mask_changes(one, {}, {"q_proj": 8}, ("a", "b")))


def test_moves_are_of_the_kept_entries_alone() -> None:
    base = {"q_proj": np.asarray([[[3.0, 4.0, 100.0, 0.5]]])}
    event = {"q_proj": np.asarray([[[3.0, 5.0, 0.0, 0.5]]])}
    final = {"q_proj": np.asarray([[[3.1, 5.0, 0.0, 0.5]]])}
    (found,) = weight_moves(base, final, event)
    whole = np.linalg.norm([3, 4, 0.5])
    assert (found.kept, found.moved) == (3, pytest.approx(1 / 3))
    assert found.norm == pytest.approx(np.linalg.norm([0.1, 1]) / whole)
    assert found.event_norm == pytest.approx(1 / whole)
    assert found.training_norm == pytest.approx(0.1 / whole)
    (alone,) = weight_moves(base, final, {})
    assert alone.event_norm is None and alone.training_norm == alone.norm
    with pytest.raises(InputError, match=r"moved: q_proj of the export is \[1, 1, 3\]"):
        list(weight_moves(base, {"q_proj": np.ones((1, 1, 3))}, {}))
