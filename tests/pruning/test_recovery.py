"""Closed forms and ADMM against float64 NumPy: each against its own definition and against what it must never do."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.masks import pack_mask
from efx_jax.pruning.recovery import (
    admm_refit,
    admm_update,
    dense_path_shift,
    gram_brain_surgeon,
    partial_brain_surgeon,
)
from efx_jax.pruning.scores import foresight_score, ria_score, wanda_score
from efx_jax.pruning.sparsegpt import obs_update, sparsegpt
from efx_jax.pruning.swaps import swap_mask
from tests.pruning.oracles import single

OUT, IN, RANK, TOKENS = 12, 16, 3, 80

pbs = jax.jit(partial_brain_surgeon)
gram_pbs = jax.jit(gram_brain_surgeon, static_argnames="chunk_rows")
admm = jax.jit(admm_update, static_argnames="steps")
refit = jax.jit(admm_refit, static_argnames=("steps", "refine", "pattern"))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer, its mask and correlated inputs X `[tokens,I]`; float32 values, held in float64 for the oracles."""

    weight: np.ndarray
    lora_a: np.ndarray
    mask: np.ndarray
    inputs: np.ndarray

    @property
    def gram(self) -> np.ndarray:
        return self.inputs.T @ self.inputs

    @property
    def energy(self) -> np.ndarray:
        return (self.inputs**2).sum(0)

    def error(self, new: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
        """Squared output error of every row under the true Gram."""
        return (((new - (self.weight if target is None else target)) @ self.inputs.T) ** 2).sum(1)


def rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def layer() -> Problem:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((IN, IN)) + 1.5 * np.eye(IN)
    return Problem(
        weight=rounded(rng.standard_normal((OUT, IN))),
        lora_a=rounded(rng.standard_normal((RANK, IN))),
        mask=rng.random((OUT, IN)) < 0.5,
        inputs=rounded(rng.standard_normal((TOKENS, IN)) @ mixing),
    )


def assert_close(found: jax.Array, wanted: np.ndarray, share: float = 1e-4) -> None:
    """Within a share of the largest entry."""
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=share * np.abs(wanted).max())


def equation_4(problem: Problem, ridge: float) -> np.ndarray:
    """-(u_S D_S A_S^T) (A D A^T + ridge I)^-1, the sums over the pruned set S of every row written out."""
    system = (problem.lora_a * problem.energy) @ problem.lora_a.T + ridge * np.eye(RANK)
    change = np.zeros((OUT, RANK))
    for row in range(OUT):
        pruned = np.flatnonzero(~problem.mask[row])
        known = sum(problem.weight[row, i] * problem.energy[i] * problem.lora_a[:, i] for i in pruned)
        change[row] = -np.linalg.solve(system, known)
    return change


def equation_3(problem: Problem, row: int, change: np.ndarray, ridge: float) -> float:
    """Change before masking: kept entries move by change A, pruned ones should end at 0."""
    moved = change @ problem.lora_a
    left = np.where(problem.mask[row], moved, problem.weight[row] + moved)
    return float((left**2 * problem.energy).sum() + ridge * (change**2).sum())


def test_the_shift_to_the_dense_path_is_ridge_regression(layer: Problem) -> None:
    """The best W' for X W'^T = X_d W^T, drawn towards W in units of each input's norm; none where the paths are one."""
    rng = np.random.default_rng(2)
    dense = rounded(layer.inputs + 0.5 * rng.standard_normal(layer.inputs.shape))
    ridge, scale = 0.3, np.sqrt(layer.energy)
    # Rows for the pull towards W stand below the tokens'.
    design = np.concatenate([layer.inputs, np.sqrt(ridge) * np.diag(scale)])
    goal = np.concatenate([dense @ layer.weight.T, np.sqrt(ridge) * scale[:, None] * layer.weight.T])
    wanted = np.linalg.lstsq(design, goal, rcond=None)[0].T
    shift = jax.jit(dense_path_shift)
    found = np.asarray(shift(*single(layer.gram, dense.T @ layer.inputs)), np.float64)
    assert_close(layer.weight + layer.weight @ found, wanted)
    np.testing.assert_array_equal(shift(*single(layer.gram, layer.gram)), 0)


@pytest.mark.parametrize("ridge", [1e-8, 50.0])
def test_pbs_is_equation_4(layer: Problem, ridge: float) -> None:
    found = pbs(*single(layer.weight, layer.lora_a, layer.mask, layer.energy), ridge)
    assert found.shape == (OUT, RANK)
    assert_close(found, equation_4(layer, ridge), 1e-5)


def test_pbs_minimises_equation_3(layer: Problem) -> None:
    found = np.asarray(pbs(*single(layer.weight, layer.lora_a, layer.mask, layer.energy), 50.0), np.float64)

    def slope(row: int, at: np.ndarray) -> np.ndarray:
        steps = 1e-4 * np.eye(RANK)
        return np.array(
            [(equation_3(layer, row, at + h, 50.0) - equation_3(layer, row, at - h, 50.0)) / 2e-4 for h in steps]
        )

    for row in range(OUT):
        untouched = np.abs(slope(row, np.zeros(RANK))).max()
        assert np.abs(slope(row, found[row])).max() < 1e-5 * untouched
        assert equation_3(layer, row, found[row], 50.0) < equation_3(layer, row, np.zeros(RANK), 50.0)


def test_pbs_is_never_better_than_the_mask_alone_once_the_mask_is_applied(layer: Problem) -> None:
    change = np.asarray(pbs(*single(layer.weight, layer.lora_a, layer.mask, layer.energy)), np.float64)
    repaired = layer.mask * (layer.weight + change @ layer.lora_a)
    diagonal = dataclasses.replace(layer, inputs=np.diag(np.sqrt(layer.energy)))
    assert (diagonal.error(repaired) > diagonal.error(layer.mask * layer.weight)).all()


def test_gram_pbs_is_least_squares_through_the_mask(layer: Problem) -> None:
    found = gram_pbs(*single(layer.weight, layer.lora_a, layer.mask, layer.gram), 0.0)
    wanted = np.zeros((OUT, RANK))
    for row, mask in enumerate(layer.mask):
        lost = layer.inputs @ np.where(mask, 0.0, layer.weight[row])
        reachable = layer.inputs @ (layer.lora_a * mask).T
        wanted[row] = np.linalg.lstsq(reachable, lost, rcond=None)[0]
    assert_close(found, wanted)


def test_gram_pbs_never_raises_the_calibration_error(layer: Problem) -> None:
    change = np.asarray(gram_pbs(*single(layer.weight, layer.lora_a, layer.mask, layer.gram)), np.float64)
    repaired = layer.mask * (layer.weight + change @ layer.lora_a)
    assert (layer.error(repaired) < layer.error(layer.mask * layer.weight)).all()


def test_the_ridge_of_gram_pbs_is_relative(layer: Problem) -> None:
    found = gram_pbs(*single(layer.weight, layer.lora_a, layer.mask, layer.gram), 0.1)
    for row in range(OUT):
        masked_a = layer.lora_a * layer.mask[row]
        system = masked_a @ layer.gram @ masked_a.T
        known = masked_a @ layer.gram @ np.where(layer.mask[row], 0.0, layer.weight[row])
        damping = 0.1 * np.mean(np.diag(system)) * np.eye(RANK)
        assert_close(found[row], np.linalg.solve(system + damping, known))
    assert_close(gram_pbs(*single(layer.weight, layer.lora_a, layer.mask, 2.0**20 * layer.gram), 0.1), found, 1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_rows_solved_together_do_not_matter(layer: Problem, chunk_rows: int) -> None:
    operands = single(layer.weight, layer.lora_a, layer.mask, layer.gram)
    assert_close(gram_pbs(*operands, 1e-3, chunk_rows=chunk_rows), np.asarray(gram_pbs(*operands, 1e-3)), 1e-5)


def test_a_row_that_keeps_nothing_gets_no_change(layer: Problem) -> None:
    mask = layer.mask.copy()
    mask[4] = False
    found = gram_pbs(*single(layer.weight, layer.lora_a, mask, layer.gram))
    assert not np.any(found[4]) and np.isfinite(found).all()


def admm_by_the_book(target: np.ndarray, mask: np.ndarray, gram: np.ndarray, steps: int, damping: float) -> np.ndarray:
    """The design's recursion in float64, with the solve written as a solve."""
    scale = np.sqrt(np.diag(gram))
    scale = np.where(scale == 0, 1.0, scale)
    gram = gram / np.outer(scale, scale) + damping * np.eye(len(gram))
    goal = target * scale
    x, y = goal.copy(), np.zeros_like(goal)
    for _ in range(steps):
        z = mask * (x + y)
        y = y + x - z
        x = np.linalg.solve(gram + np.eye(len(gram)), (goal @ gram + z - y).T).T
    return mask * (x + y) / scale


def least_squares_on_the_support(problem: Problem) -> np.ndarray:
    fitted = np.zeros_like(problem.weight)
    for row, mask in enumerate(problem.mask):
        wanted = problem.inputs @ problem.weight[row]
        fitted[row, mask] = np.linalg.lstsq(problem.inputs[:, mask], wanted, rcond=None)[0]
    return fitted


@pytest.mark.parametrize("steps", [1, 20, 30])
def test_admm_is_the_recursion_of_the_design(layer: Problem, steps: int) -> None:
    found = admm(*single(layer.weight, layer.mask, layer.gram), steps=steps)
    assert_close(found, admm_by_the_book(layer.weight, layer.mask, layer.gram, steps, 1e-2))


def test_admm_leaves_exact_zeros_and_never_raises_the_calibration_error(layer: Problem) -> None:
    found = np.asarray(admm(*single(layer.weight, layer.mask, layer.gram), steps=20), np.float64)
    assert not found[~layer.mask].any()
    assert (layer.error(found) < layer.error(layer.mask * layer.weight)).all()


def test_twenty_steps_of_admm_come_within_five_percent_of_least_squares(layer: Problem) -> None:
    mild = dataclasses.replace(layer, inputs=rounded(np.random.default_rng(1).standard_normal((TOKENS, IN))))
    found = np.asarray(admm(*single(mild.weight, mild.mask, mild.gram), steps=20), np.float64)
    best = mild.error(least_squares_on_the_support(mild)).sum()
    assert best <= mild.error(found).sum() < 1.05 * best
    assert mild.error(mild.mask * mild.weight).sum() > 1.05 * best


def test_weights_of_inputs_that_calibration_never_saw_survive_admm(layer: Problem) -> None:
    silent = layer.inputs.copy()
    silent[:, [2, 7]] = 0.0
    dead = dataclasses.replace(layer, inputs=silent)
    found = np.asarray(admm(*single(dead.weight, dead.mask, dead.gram), steps=20), np.float64)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, [2, 7]], (dead.mask * dead.weight)[:, [2, 7]], rtol=1e-5)
    assert_close(found, admm_by_the_book(dead.weight, dead.mask, dead.gram, 20, 1e-2))


def test_admm_fits_its_target_and_not_the_weight(layer: Problem) -> None:
    target = rounded(np.random.default_rng(2).standard_normal((OUT, IN)))
    found = admm(*single(layer.weight, layer.mask, layer.gram, target), steps=20)
    assert_close(found, admm_by_the_book(target, layer.mask, layer.gram, 20, 1e-2))
    assert (layer.error(np.asarray(found), target) < layer.error(layer.mask * layer.weight, target)).all()


def refined_by_the_book(problem: Problem, steps: int, refine: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The recursion with the mask chosen again: of every `block` inputs of a row as many stay as before."""
    scale = np.sqrt(np.diag(problem.gram))
    gram = problem.gram / np.outer(scale, scale) + 1e-2 * np.eye(IN)
    goal = problem.weight * scale
    x, y, mask = goal.copy(), np.zeros_like(goal), problem.mask.copy()
    for step in range(steps):
        for row, first in itertools.product(range(OUT), range(0, IN, block) if step < refine else ()):
            part = slice(first, first + block)
            kept = int(mask[row, part].sum())
            order = np.argsort(-np.abs((x + y)[row, part]), kind="stable")
            mask[row, part] = np.isin(np.arange(block), order[:kept])
        z = mask * (x + y)
        y = y + x - z
        x = np.linalg.solve(gram + np.eye(IN), (goal @ gram + z - y).T).T
    return mask * (x + y) / scale, mask


@pytest.mark.parametrize(("refine", "pattern"), [(0, None), (7, None), (7, (2, 4))])
def test_a_refined_mask_is_chosen_by_what_the_others_cannot_make_up_for(
    layer: Problem, refine: int, pattern: tuple[int, int] | None
) -> None:
    problem = layer
    if pattern:
        # Two of every four consecutive inputs.
        blocks = np.argsort(np.random.default_rng(5).random((OUT, IN // 4, 4)), axis=-1) < 2
        problem = dataclasses.replace(layer, mask=blocks.reshape(OUT, IN))
    weight, mask = refit(*single(problem.weight, problem.mask, problem.gram), steps=15, refine=refine, pattern=pattern)
    expected, expected_mask = refined_by_the_book(problem, 15, refine, pattern[1] if pattern else IN)
    np.testing.assert_array_equal(mask, expected_mask)
    assert_close(weight, expected)
    assert np.any(np.asarray(mask) != problem.mask) == (refine > 0)
    np.testing.assert_array_equal(np.asarray(mask).sum(1), problem.mask.sum(1))
    assert not np.asarray(weight)[~np.asarray(mask)].any()


def test_refining_the_mask_lowers_the_calibration_error(layer: Problem) -> None:
    fixed, _ = refit(*single(layer.weight, layer.mask, layer.gram), steps=30)
    moved, _ = refit(*single(layer.weight, layer.mask, layer.gram), steps=30, refine=15)
    assert layer.error(np.asarray(moved)).sum() < 0.9 * layer.error(np.asarray(fixed)).sum()


@pytest.mark.parametrize("pattern", [None, (5, 8)])
def test_what_comes_back_at_a_later_event_is_what_its_score_says(
    layer: Problem, pattern: tuple[int, int] | None
) -> None:
    """The last four of every eight inputs are gone; the new mask has five, three left and two gone."""
    before = np.tile(np.arange(8) < 4, (OUT, IN // 8))
    asked = np.tile(np.isin(np.arange(8), [0, 1, 2, 4, 6]), (OUT, IN // 8))
    target = layer.weight * before
    for nudge in (0.0, 1e-6):
        gram = layer.gram * (1 + nudge * np.cos(np.arange(IN * IN)).reshape(IN, IN))
        weight, mask = refit(*single(target, asked, gram), steps=15, refine=7, pattern=pattern)
        kept = np.asarray(mask)
        # All that is left stays, whatever the score says; of what is gone, as many as fit, as the score says.
        assert kept[before].all() and not kept[~before & ~asked].any()
        np.testing.assert_array_equal(kept.sum(1), asked.sum(1))
        assert layer.error(np.asarray(weight), target).max() < 1e-6 * layer.error(0 * target, target).min()


def test_surgeons_run_under_vmap_over_layers(layer: Problem) -> None:
    weight, lora_a, mask, gram = single(layer.weight, layer.lora_a, layer.mask, layer.gram)
    weights, masks = jnp.stack([weight, 2 * weight]), jnp.stack([mask, ~mask])
    lora_as, grams = jnp.stack([lora_a] * 2), jnp.stack([gram, gram])
    energies = jnp.diagonal(grams, axis1=1, axis2=2)
    found = jax.vmap(pbs)(weights, lora_as, masks, energies)
    assert_close(found[1], np.asarray(pbs(2 * weight, lora_a, ~mask, energies[0])), 1e-5)
    found = jax.vmap(gram_pbs)(weights, lora_as, masks, grams)
    assert_close(found[1], np.asarray(gram_pbs(2 * weight, lora_a, ~mask, gram)), 1e-5)
    found = jax.vmap(admm)(weights, masks, grams)
    assert_close(found[1], np.asarray(admm(2 * weight, ~mask, gram)), 1e-5)


def equations(program: Any) -> Iterator[Any]:
    """Every operation of a program, those inside loops and calls too."""
    for equation in program.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(("recover", "count"), [("pbs", 4), ("gram_pbs", 5), ("admm", 2)])
def test_every_product_of_a_solve_asks_for_float32(layer: Problem, recover: str, count: int) -> None:
    weight, lora_a, mask, gram, energy = single(layer.weight, layer.lora_a, layer.mask, layer.gram, layer.energy)
    program = {
        "pbs": lambda: jax.make_jaxpr(partial_brain_surgeon)(weight, lora_a, mask, energy),
        "gram_pbs": lambda: jax.make_jaxpr(gram_brain_surgeon)(weight, lora_a, mask, gram),
        "admm": lambda: jax.make_jaxpr(admm_update)(weight, mask, gram),
    }[recover]()
    found = [equation for equation in equations(program.jaxpr) if equation.primitive.name == "dot_general"]
    assert len(found) == count
    for product in found:
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_no_solve_calls_a_batched_lapack_kernel(layer: Problem) -> None:
    """Two batched LAPACK kernels at once wait for each other for ever on XLA's CPU backend."""
    arguments = [np.stack([array] * 2) for array in single(layer.weight, layer.mask, layer.gram)]
    program = jax.make_jaxpr(jax.vmap(admm_update))(*arguments)
    found = [equation for equation in equations(program.jaxpr) if equation.primitive.name == "cholesky"]
    assert found and all(equation.invars[0].aval.ndim == 2 for equation in found)
    rows = jax.make_jaxpr(gram_brain_surgeon)(*single(layer.weight, layer.lora_a, layer.mask, layer.gram))
    assert not [equation for equation in equations(rows.jaxpr) if equation.primitive.name == "cholesky"]


def test_refinement_keeps_no_entry_of_an_input_that_is_always_0() -> None:
    rng = np.random.default_rng(0)
    inputs = 0.01 * rng.standard_normal((80, 8)) * (np.arange(8) >= 3)
    weight, mask = rng.standard_normal((6, 8)), np.tile(np.arange(8) >= 4, (6, 1))
    kept = np.asarray(refit(jnp.float32(weight), mask, jnp.float32(inputs.T @ inputs), refine=10)[1])
    assert not kept[:, :3].any() and (kept.sum(axis=1) == 4).all()


def test_a_gram_with_nan_gives_nan_and_not_an_unrepaired_row(layer: Problem) -> None:
    """A row that looks as if it had nothing to solve for would hide that calibration overflowed."""
    broken = np.array(layer.gram)
    broken[2, 2] = np.nan
    assert np.isnan(np.asarray(gram_pbs(layer.weight, layer.lora_a, layer.mask, broken))).all()


def test_what_would_be_broadcast_is_refused() -> None:
    """With at most eight inputs a packed mask is one column, which fits any number of them."""
    weight, lora_a, gram = np.ones((4, 8), np.float32), np.ones((2, 8), np.float32), np.eye(8, dtype=np.float32)
    mask = np.ones((4, 8), bool)
    packed = pack_mask(jnp.asarray(mask))
    energy = np.ones(8, np.float32)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: partial_brain_surgeon(weight, lora_a, packed, energy), r"mask: expected bool \[4, 8\], found uint8"),
        (lambda: gram_brain_surgeon(weight, lora_a, packed, gram), r"mask: expected bool \[4, 8\], found uint8"),
        (lambda: admm_update(weight, packed, gram), r"mask: expected bool \[4, 8\], found uint8"),
        (lambda: obs_update(weight, packed, gram), r"mask: expected bool \[4, 8\], found uint8"),
        (lambda: swap_mask(weight, packed, gram, 1), r"mask: expected bool \[4, 8\], found uint8"),
        (lambda: admm_update(weight, mask[:, :1], gram), r"mask: expected bool \[4, 8\], found bool \[4, 1\]"),
        (lambda: partial_brain_surgeon(weight, lora_a, mask, energy[:1]), "input_energy: expected shape"),
        (lambda: partial_brain_surgeon(weight, lora_a[:, :1], mask, energy), "lora_a: expected shape"),
        (lambda: gram_brain_surgeon(weight, lora_a, mask, gram[:1]), "gram: expected shape"),
        (lambda: admm_update(weight, mask, gram, weight[:1]), "target: expected shape"),
        (lambda: sparsegpt(weight, gram[:1], 0.5), "gram: expected shape"),
        (lambda: wanda_score(weight, energy[:1]), r"input_norm: expected shape \[8\], found \[1\]"),
        (lambda: foresight_score(weight, energy, energy[:1]), r"downstream_norm: expected shape \[4\], found \[1\]"),
        (lambda: ria_score(weight, energy[:, None]), r"input_norm: expected shape \[8\], found \[8, 1\]"),
    ]
    for call, complaint in calls:
        with pytest.raises(InputError, match=complaint):
            call()
