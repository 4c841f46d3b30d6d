"""A run's own importance at an event: which batches it reads, and the masks that come of it."""

import dataclasses
import functools
from math import floor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from efx_jax.config import Config, LoraConfig, MeshConfig, ModelConfig, PruneConfig, TrainConfig
from efx_jax.masks import unpack_mask
from efx_jax.parallel.mesh import make_mesh
from efx_jax.pruning.budget import budget_statistics, event_budgets
from efx_jax.pruning.output_gradient import output_gradient_energy
from efx_jax.pruning.selection import select_mask
from efx_jax.training.events import prune_run
from efx_jax.training.importance import run_importance
from efx_jax.training.prepare import calibration
from efx_jax.training.schedule import Event
from tests.tiers import few_of
from tests.tiny import LLAMA
from tests.training.before_event import start

SPEC = dataclasses.replace(LLAMA, intermediate_size=32)
SCORES: Any = ("lora_gradient", "dpruner")
LABELLED: Any = [(score, "text") for score in (*SCORES, "foresight_loss")] + [("foresight_loss", "model")]


def settings(score: Any, shape: tuple[int, int, int] = (1, 1, 1)) -> Config:
    return Config(
        model=ModelConfig(compute_dtype="float32"),
        lora=LoraConfig(rank=2, dropout=0.5),
        prune=PruneConfig(
            score=score,
            group="matrix",
            gradient_batches=2,
            domain_steps=2,
            calibration_rows=8,
            calibration_length=16,
            calibration_tokens=64,
        ),
        train=TrainConfig(batch_size=4),
        mesh=MeshConfig(*shape),
    )


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
def test_an_event_of_a_run_prunes_by_its_own_importance(score: Any, tmp_path: Path) -> None:
    config = settings(score)
    prepared, state = start(config, SPEC)
    before = jax.tree.map(np.array, state.params)
    event = Event(3, 0.5, True)
    importance, _ = run_importance(config, prepared, state, event, "xla")
    assert importance is not None
    after = prune_run(config, prepared, state, event, tmp_path, "xla")
    for name, mask in after.masks.items():
        for layer, kept in enumerate(np.asarray(unpack_mask(mask, state.params["layers"][name].shape[-1]))):
            np.testing.assert_array_equal(kept, select_mask(importance[name][layer], 0.5, "matrix"))
            assert (~kept).sum() == floor(0.5 * kept.size)
    # The pass has moved copies: the mask is for the model as it was.
    jax.tree.map(np.testing.assert_array_equal, after.params, before)


def test_an_event_of_a_run_reads_the_gradients_of_its_calibration_rows(tmp_path: Path) -> None:
    config = settings("foresight_loss")
    config = dataclasses.replace(config, prune=dataclasses.replace(config.prune, budget="global", budget_spread=0.3))
    prepared, state = start(config, SPEC)
    event = Event(3, 0.5, True)
    importance, _ = run_importance(config, prepared, state, event, "xla")
    assert importance is not None
    after = prune_run(config, prepared, state, event, tmp_path, "xla")
    layers = state.params["layers"]
    sizes = {name: layers[name].size for name in after.masks}
    kept = {
        name: int(np.asarray(unpack_mask(mask, layers[name].shape[-1])).sum()) for name, mask in after.masks.items()
    }
    # Every matrix may round by one entry.
    assert sum(kept.values()) == pytest.approx(0.5 * sum(sizes.values()), abs=len(kept) * SPEC.num_layers)
    shares = [kept[name] / sizes[name] for name in kept]
    assert max(shares) - min(shares) > 0.05
    assert {name: energy.shape for name, energy in importance.items()} == {
        name: layers[name].shape[:2] for name in config.prune.targets
    }


def test_a_part_of_the_calibration_rows_may_be_surveyed() -> None:
    """The first ones of those that all statistics are taken from, with a draw of its own for every event."""
    config = settings("foresight_loss")
    prepared, state = start(config, SPEC)
    prune = dataclasses.replace(config.prune, survey_share=0.3)
    few = dataclasses.replace(config, prune=prune)
    found, stats = run_importance(few, prepared, state, Event(1, 0.5, True), "xla")
    batches = calibration(config, prepared, 3)
    rows, every = _real_rows(batches), _real_rows(calibration(config, prepared))
    assert len(rows) == 3 and set(rows) <= set(every) and len(every) == 8
    expected, _ = output_gradient_energy(state.params, batches, SPEC, state.train.adapters, compute_dtype="float32")
    assert float(stats.tokens[0]) == sum(len(row) for row in rows)
    for name, energy in found.items():
        np.testing.assert_allclose(energy, expected[name], rtol=1e-4, atol=1e-5 * float(np.max(expected[name])))
    drawn = dataclasses.replace(few, prune=dataclasses.replace(prune, gradient_labels="model"))
    energies = [run_importance(drawn, prepared, state, Event(step, 0.5, True), "xla")[0] for step in (1, 1, 2)]
    np.testing.assert_array_equal(energies[0]["k_proj"], energies[1]["k_proj"])
    assert np.any(np.asarray(energies[0]["k_proj"]) != energies[2]["k_proj"])


def test_budgets_of_an_event_block_by_block_are_those_of_the_surveyed_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the gradients' pass has summed: there is no other for them."""
    monkeypatch.delattr("efx_jax.training.events.budget_statistics")
    config = settings("foresight_loss")
    prune = dataclasses.replace(
        config.prune, budget="global", budget_spread=0.4, recovery="admm", admm_steps=2, survey_share=0.3
    )
    config = dataclasses.replace(config, prune=prune)
    prepared, state = start(config, SPEC)
    event = Event(1, 0.5, True)
    importance, _ = run_importance(config, prepared, state, event, "xla")
    adapters, params = state.train.adapters, jax.tree.map(np.array, state.params)

    def budgets(rows: int) -> list[dict[str, float]]:
        stats = budget_statistics(params, adapters, None, calibration(config, prepared, rows), SPEC, prune, "float32")
        return list(event_budgets(params, adapters, stats, importance, SPEC, prune))

    wanted, others = budgets(3), budgets(8)
    after = prune_run(config, prepared, state, event, tmp_path, "xla")
    for name, mask in after.masks.items():
        zeros = 1 - np.asarray(unpack_mask(mask, params["layers"][name].shape[-1])).mean(axis=(1, 2))
        np.testing.assert_allclose(zeros, [layer[name] for layer in wanted], atol=1e-6)
    assert wanted != others


def test_the_importance_is_that_of_the_batches_to_come() -> None:
    """Eight rows are two batches: the third step's batches are those of the first, in the next epoch's order."""
    config = settings("lora_gradient")
    prepared, state = start(config, SPEC)
    found = [run_importance(config, prepared, state, Event(step, 0.5, True), "xla")[0] for step in (2, 2, 3)]
    np.testing.assert_array_equal(found[0]["k_proj"], found[1]["k_proj"])
    assert np.any(np.asarray(found[0]["k_proj"]) != found[2]["k_proj"])


def test_other_scores_read_no_importance() -> None:
    config = settings("wanda")
    prepared, state = start(config, SPEC)
    assert run_importance(config, prepared, state, Event(1, 0.5, True), "xla") == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize(("score", "labels"), few_of(LABELLED, *LABELLED[-2:]))
def test_on_a_mesh_the_importance_is_the_same_and_lies_as_the_weights(score: Any, labels: Any) -> None:
    """Whatever the device, the same tokens are drawn."""
    event, shape = Event(2, 0.5, True), (1, 2, 2)
    config = _labelled(settings(score), labels)
    alone, seen = run_importance(config, *start(config, SPEC), event, "xla")
    config = _labelled(settings(score, shape), labels)
    with jax.set_mesh(make_mesh(config.mesh)):
        prepared, state = start(config, SPEC)
        found, stats = run_importance(config, prepared, state, event, "xla")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), stats, seen)
    for name, values in found.items():
        np.testing.assert_allclose(values, alone[name], rtol=1e-3, atol=1e-3 * float(np.max(alone[name])))
        weight = state.params["layers"][name]
        if values.ndim == weight.ndim:
            assert values.sharding.is_equivalent_to(weight.sharding, weight.ndim)


def _real_rows(batches: Any) -> list[tuple[int, ...]]:
    """What stands in for rows that a batch lacks has no tokens."""
    return [
        tuple(tokens[:length].tolist())
        for batch in batches
        for tokens, length in zip(np.asarray(batch["tokens"]), np.asarray(batch["lengths"]), strict=True)
        if length
    ]


def _labelled(config: Config, labels: Any) -> Config:
    return dataclasses.replace(config, prune=dataclasses.replace(config.prune, gradient_labels=labels))
