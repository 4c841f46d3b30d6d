"""Prune events on meshes against one device: masks, repairs and the memory of the moving average."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efx_jax.config import MeshConfig, PruneConfig
from efx_jax.lora import Adapters, effective_weight, init_lora
from efx_jax.model.spec import LINEARS, init_params
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import tree_shardings
from efx_jax.pruning.average import init_prune_state
from efx_jax.pruning.blockwise import prune_event_blockwise
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.output_gradient import output_gradient_energy
from efx_jax.pruning.permutation import find_order, permute
from efx_jax.pruning.statistics import collect_statistics
from tests.tiers import few_of
from tests.tiny import EVEN

pytestmark = pytest.mark.slow

SPEC = dataclasses.replace(EVEN, model_type="qwen3", vocab_size=64, head_dim=8, qk_norm=True)
GATED: Any = "foresight_gated"
# Mesh and event from given statistics; "merge" keeps the average itself, without it snapshots rebuild it.
EVENTS = {
    "rows, snapshots": ((2, 2, 2), PruneConfig(score=GATED, group="row", ema=0.5)),
    "matrix, paper": ((1, 4, 2), PruneConfig(score="foresight", group="matrix", recovery="pbs", ema=0.5)),
    "bounded, Gram": ((1, 1, 4), PruneConfig(score=GATED, group="bounded", recovery="gram_pbs")),
    "ADMM, scores on the host": ((2, 2, 2), PruneConfig(score=GATED, group="2:4", recovery="admm", ema=0.5)),
    "merge": ((2, 4, 1), PruneConfig(score="wanda", group="row", merge_each_event=True, ema=0.5)),
}
BLOCKWISE = {
    "Gram, each block sees the pruned ones": (
        (2, 2, 2),
        PruneConfig(score=GATED, group="matrix", recovery="gram_pbs", sequential=True),
    ),
    "ADMM": ((1, 2, 4), PruneConfig(score=GATED, group="row", recovery="admm")),
    "swaps, A and B by turns": (
        (1, 2, 2),
        PruneConfig(score=GATED, group="row", swaps=3, recovery="gram_pbs", pbs_rounds=2),
    ),
    "ADMM towards the dense path": (
        (2, 2, 2),
        PruneConfig(score=GATED, group="row", recovery="admm", sequential=True, dense_path=1.0),
    ),
    "of preset efx": (
        (1, 2, 2),
        PruneConfig(
            score="foresight_loss",
            reach_shrink=0.5,
            group="bounded",
            bound=0.3,
            budget="global",
            budget_spread=0.3,
            recovery="admm",
            admm_steps=20,
            admm_refine=10,
            admm_damping=0.1,
        ),
    ),
}


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf if leaf.ndim < 3 else 5 * leaf, init_params(jax.random.key(0), SPEC))


@pytest.fixture(scope="module")
def adapters(params: dict[str, Any]) -> Adapters:
    return moved(init_lora(jax.random.key(1), params, SPEC, rank=3), 2)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, np.ndarray]]:
    """2,048 tokens for at most 64 inputs: Grams that are far from singular."""
    tokens = np.random.default_rng(3).integers(0, SPEC.vocab_size, (4, 32, 16)).astype(np.int32)
    return [{"tokens": part, "lengths": np.full(32, 16, np.int32)} for part in tokens]


@pytest.fixture(scope="module")
def stats(params: dict[str, Any], adapters: Adapters, batches: Any) -> Any:
    return collect_statistics(params, batches, SPEC, adapters, gram=True)


def moved(adapters: Adapters, seed: int) -> Adapters:
    """As if training had gone on: another B."""
    rng = np.random.default_rng(seed)
    lora_b = {
        name: np.asarray(adapters.lora_b[name]) + 0.05 * rng.standard_normal(adapters.lora_b[name].shape)
        for name in LINEARS
    }
    placed = {name: jax.device_put(np.float32(b), adapters.lora_b[name].sharding) for name, b in lora_b.items()}
    return dataclasses.replace(adapters, lora_b=placed)


def events(count: int, event: Any, config: PruneConfig, params: Any, adapters: Adapters, mesh: Any = None) -> list[Any]:
    """The outcomes of events with training between them; `event` maps (params, adapters, masks, state)."""
    state = init_prune_state(params, adapters, config, jax.random.key(4), events=2)
    if mesh is not None:
        tree = {"params": params, "adapters": adapters, "state": state}
        tree = jax.device_put(tree, tree_shardings(mesh, tree))
        params, adapters, state = tree["params"], tree["adapters"], tree["state"]
    masks, outcomes = None, []
    for number in range(count):
        params, adapters, masks, state = event(params, adapters, masks, state)
        outcomes.append((params, adapters, masks, state))
        adapters = moved(adapters, 10 + number)
    return outcomes


def assert_same_outcomes(found: list[Any], expected: list[Any], tolerance: float = 1e-5) -> None:
    differing = total = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[2].keys() == theirs[2].keys() == set(LINEARS)
        for name in LINEARS:
            same = np.asarray(ours[2][name]) == np.asarray(theirs[2][name])
            differing += int((~same).sum())
            total += same.size
            # A row's repair depends on its whole mask.
            rows = same.all(axis=-1, keepdims=True)
            assert_close(weight_of(ours, name), weight_of(theirs, name), tolerance, rows)
            assert_close(ours[1].lora_a[name], theirs[1].lora_a[name], tolerance)
        assert int(ours[3].event) == int(theirs[3].event)
        for memory, other in zip(jax.tree.leaves(ours[3].snapshots), jax.tree.leaves(theirs[3].snapshots), strict=True):
            assert_close(memory, other, tolerance)
        for name, blocks in theirs[3].score.items():
            for block, other in zip(ours[3].score[name], blocks, strict=True):
                assert block.sharding.memory_kind == "pinned_host"
                assert_close(block, other, tolerance)
    assert differing <= 1e-4 * total, f"{differing} of {total} mask entries differ"


def weight_of(outcome: Any, name: str) -> np.ndarray:
    """U `[L,O,I]` after an event."""
    params, adapters = outcome[:2]
    operands = (params["layers"][name], adapters.lora_a[name], adapters.lora_b[name])
    return np.asarray(effective_weight(*map(np.asarray, operands), adapters.scale))


def assert_close(found: Any, expected: Any, tolerance: float, where: Any = True) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    worst = np.max(np.abs(found - expected), where=where, initial=0.0)
    assert worst <= tolerance * np.abs(expected).max(), worst / np.abs(expected).max()


@pytest.mark.parametrize("case", few_of(EVENTS, "matrix, paper", "ADMM, scores on the host"))
def test_events_on_a_mesh_are_those_of_one_device(case: str, params: Any, adapters: Adapters, stats: Any) -> None:
    shape, config = EVENTS[case]
    expected = events(
        2, lambda *state: prune_event(*state[:3], stats, state[3], SPEC, config), config, params, adapters
    )
    mesh = make_mesh(MeshConfig(*shape))
    seen = jax.device_put(stats, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        found = events(
            2, lambda *state: prune_event(*state[:3], seen, state[3], SPEC, config), config, params, adapters, mesh
        )
    assert_same_outcomes(found, expected)
    assert_lies_as_before(found, mesh)


@pytest.mark.parametrize("case", few_of(BLOCKWISE, "ADMM", "of preset efx"))
def test_events_block_by_block_are_those_of_one_device(
    case: str, params: Any, adapters: Adapters, batches: Any
) -> None:
    """Calibration runs on the mesh as well, so that the statistics differ by roundings.

    One event: where A's kept part is nearly singular the Gram surgeon enlarges them tenfold an event, on one device as
    well when the calibration batches change places (2e-5 of the largest weight after two).
    """
    shape, config = BLOCKWISE[case]

    def event(params: Any, adapters: Any, masks: Any, state: Any) -> Any:
        reach = None
        if config.score == "foresight_loss":
            reach, _ = output_gradient_energy(params, batches, SPEC, adapters, masks)
        return prune_event_blockwise(
            params, adapters, masks, batches, state, SPEC, config, importance=reach, packed=False
        )

    expected = events(1, event, config, params, adapters)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        found = events(1, event, config, params, adapters, mesh)
    assert_same_outcomes(found, expected)
    assert_lies_as_before(found, mesh)


def test_a_second_event_on_a_mesh_compiles_nothing(params: Any, batches: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Outside of `jit` a `shard_map`, such as that of the embedding, would be compiled for every batch."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    tree = jax.device_put(params, tree_shardings(mesh, {"params": params})["params"])
    config = PruneConfig(sparsity=0.5, recovery="admm", admm_steps=2)

    def event() -> None:
        prune_event_blockwise(tree, None, None, batches, None, SPEC, config)

    with jax.set_mesh(mesh):
        event()
        with jax.log_compiles():
            caplog.clear()
            event()
    assert not [record.message for record in caplog.records if "ompiling" in record.message]


def test_units_change_places_on_a_mesh_as_on_one_device(params: Any, adapters: Adapters, stats: Any) -> None:
    config = PruneConfig(group="2:4", recovery="admm")
    order = find_order(params, adapters, stats, SPEC, config)
    expected = permute(params, adapters, order)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    tree = {"params": params, "adapters": adapters}
    tree = jax.device_put(tree, tree_shardings(mesh, tree))
    seen = jax.device_put(stats, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        found_order = find_order(tree["params"], tree["adapters"], seen, SPEC, config)
        found = permute(tree["params"], tree["adapters"], order)
    assert not any(np.array_equal(places, np.sort(places)) for places in order.columns.values())
    jax.tree.map(np.testing.assert_array_equal, found_order, order)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    tree = {"params": found[0], "adapters": found[1]}
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(tree_shardings(mesh, tree)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.shape, leaf.sharding, sharding)


def assert_lies_as_before(outcomes: list[Any], mesh: Any) -> None:
    """Every array of the last outcome where `partition` has it."""
    params, adapters, masks, state = outcomes[-1]
    tree = {"params": params, "adapters": adapters, "masks": masks, "snapshots": state.snapshots}
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(tree_shardings(mesh, tree)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.shape, leaf.sharding, sharding)
