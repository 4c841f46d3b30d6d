"""Events block by block: what the next block sees, and how often they compile."""

import dataclasses
from math import floor
from typing import Any

import chex
import numpy as np
import pytest

from efx_jax.config import PruneConfig
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.model.decoder import hidden_states
from efx_jax.pruning import block as block_module
from efx_jax.pruning import blockwise as blockwise_module
from efx_jax.pruning.blockwise import prune_event_blockwise
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.statistics import Statistics, collect_statistics
from tests.pruning.event_parts import PLAIN, SOME, TWO, Tree, random_masks

SEQUENTIAL = PruneConfig(score="wanda", group="matrix", recovery="pbs", targets=TWO, sequential=True)
AT_ONCE = dataclasses.replace(SEQUENTIAL, sequential=False)


@pytest.fixture(scope="module")
def sequential(llama: Any) -> tuple[Tree, Adapters, Tree, Any]:
    return prune_event_blockwise(llama.params, llama.adapters, None, llama.batches, None, llama.spec, SEQUENTIAL)


def test_block_by_block_equals_one_pass_on_the_first_block_and_differs_later(
    llama: Any, stats: Statistics, sequential: Any
) -> None:
    _, adapters, masks, state = sequential
    _, once, masks_once, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, AT_ONCE)
    assert int(state.event) == 1
    for name in TWO:
        np.testing.assert_array_equal(masks[name][0], masks_once[name][0])
        np.testing.assert_allclose(adapters.lora_b[name][0], once.lora_b[name][0], rtol=1e-4, atol=1e-5)
    assert any(np.any(masks[name][1] != masks_once[name][1]) for name in TWO)


def test_block_by_block_calibrates_the_second_block_behind_the_pruned_first(llama: Any, sequential: Any) -> None:
    _, adapters, masks, _ = sequential
    first_pruned = {name: mask.at[1].set(True) for name, mask in masks.items()}
    first_mended = {name: b.at[1].set(llama.adapters.lora_b[name][1]) for name, b in adapters.lora_b.items()}
    adapters = dataclasses.replace(adapters, lora_b=first_mended)
    seen = collect_statistics(llama.params, llama.batches, llama.spec, adapters, first_pruned, gram=True)
    _, _, wanted, _ = prune_event(llama.params, llama.adapters, None, seen, None, llama.spec, AT_ONCE)
    for name in TWO:
        np.testing.assert_array_equal(masks[name][1], wanted[name][1])


@pytest.mark.parametrize("recovery", ["gram_pbs", "admm"])
def test_block_by_block_on_the_model_as_it_was_equals_one_pass(llama: Any, recovery: Any) -> None:
    config = PruneConfig(score="foresight_gated", group="matrix", recovery=recovery, targets=SOME)
    old = random_masks(llama, SOME)
    seen = collect_statistics(llama.params, llama.batches, llama.spec, llama.adapters, old, gram=True)
    whole = prune_event(llama.params, llama.adapters, old, seen, None, llama.spec, config)
    blocks = prune_event_blockwise(llama.params, llama.adapters, old, llama.batches, None, llama.spec, config)
    chex.assert_trees_all_equal(whole[2], blocks[2])
    chex.assert_trees_all_close(whole[:2], blocks[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_recovery_towards_the_dense_path_ends_closer_to_it(llama: Any) -> None:
    """The first block has nothing before it to make up for; behind the last one the hidden states are closer."""
    config = PruneConfig(score="wanda", recovery="admm", admm_steps=10, sequential=True, targets=SOME)
    old = random_masks(llama, TWO)
    found = {}
    for share in (0.0, 1.0):
        chosen = dataclasses.replace(config, dense_path=share)
        found[share] = prune_event_blockwise(llama.params, llama.adapters, old, llama.batches, None, llama.spec, chosen)
    for name in TWO:
        chex.assert_trees_all_equal(found[0.0][0]["layers"][name][0], found[1.0][0]["layers"][name][0])
        assert np.any(found[0.0][0]["layers"][name][1] != found[1.0][0]["layers"][name][1])

    def hidden(params: Any, adapters: Any, masks: Any) -> list[np.ndarray]:
        return [
            np.asarray(hidden_states(params, np.asarray(batch["tokens"]), llama.spec, adapters, masks))[row, :length]
            for batch in llama.batches
            for row, length in enumerate(batch["lengths"])
        ]

    dense = hidden(llama.params, llama.adapters, old)
    apart = {
        share: sum(np.sum((a - b) ** 2) for a, b in zip(hidden(*event[:3]), dense, strict=True))
        for share, event in found.items()
    }
    assert apart[1.0] < apart[0.0]


def test_block_by_block_without_lengths_every_token_is_real(llama: Any, sequential: Any) -> None:
    tokens = llama.batches[0]["tokens"]
    runs = [
        prune_event_blockwise(llama.params, llama.adapters, None, [batch], None, llama.spec, SEQUENTIAL)
        for batch in ({"tokens": tokens}, {"tokens": tokens, "lengths": np.full(8, 16)})
    ]
    for name in TWO:
        np.testing.assert_array_equal(runs[0][2][name], runs[1][2][name])


def test_a_new_sparsity_needs_no_new_program(
    llama: Any, stats: Statistics, sequential: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced_again(*_: Any) -> None:
        raise AssertionError("a new trace")

    prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, PLAIN)
    monkeypatch.setattr(block_module, "block_scores", traced_again)
    monkeypatch.setattr(blockwise_module, "block_statistics", traced_again)
    for sparsity in (0.0, 0.1, 0.9):
        config = dataclasses.replace(PLAIN, sparsity=sparsity)
        _, _, masks, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
        assert int(np.sum(~np.asarray(masks["down_proj"]))) == 2 * 16 * floor(sparsity * 24)
        config = dataclasses.replace(SEQUENTIAL, sparsity=sparsity)
        prune_event_blockwise(llama.params, llama.adapters, None, llama.batches, None, llama.spec, config)
    other = dataclasses.replace(PLAIN, group="1:2")
    with pytest.raises(AssertionError, match="a new trace"):
        prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, other)


def test_block_by_block_without_a_real_token_is_refused_with_one_line(llama: Any) -> None:
    empty = {"tokens": llama.batches[0]["tokens"], "lengths": np.zeros(8, np.int32)}
    for batches in ([], [empty]):
        with pytest.raises(InputError, match="expected at least one real token, found none") as caught:
            prune_event_blockwise(llama.params, llama.adapters, None, batches, None, llama.spec, PLAIN)
        assert "\n" not in str(caught.value)
