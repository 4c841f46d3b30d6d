"""What a pruned matrix changes: by float64 NumPy on the activations of a whole pruned forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.analysis.blocks import look_at, mean_nll, walk
from efx_jax.analysis.targets import entry_changes, output_change, own_change, target_change
from efx_jax.lora import merge
from efx_jax.model.decoder import forward
from efx_jax.model.spec import LINEARS
from efx_jax.pruning.statistics import INPUT_OF


def pruned_view(tiny, name: str, mask: np.ndarray):
    """The second block of the merged model, one matrix of it having lost entries; all before it is as it was."""
    merged = merge(tiny.params, tiny.adapters, None)
    stacked = merged["layers"][name]
    layers = merged["layers"] | {name: stacked.at[1].set(jnp.where(mask, stacked[1], 0.0))}
    ((_, view),) = walk(look_at(merged | {"layers": layers}, None, tiny.batch, tiny.spec), [1])
    return view


def wide(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def summed(tiny, change: np.ndarray) -> float:
    real = np.arange(12)[None] < tiny.batch["lengths"][:, None]
    return float(np.sum(np.square(change)[real]))


def logits(tiny, view) -> np.ndarray:
    """[B,N,T,S] of rotated q and k; what is no pair of a real token and an earlier one is 0."""
    spec = tiny.spec
    half = spec.head_dim // 2
    angles = np.arange(12)[:, None] * (spec.rope.theta ** (-np.arange(half) / half))[None]

    def rotate(heads: np.ndarray) -> np.ndarray:
        turned = (heads[..., :half] + 1j * heads[..., half:]) * np.exp(1j * angles)[None, :, None]
        return np.concatenate([turned.real, turned.imag], -1)

    q, k = rotate(wide(view.taps["q"])), rotate(wide(view.taps["k"]))
    k = np.repeat(k, spec.num_heads // spec.num_kv_heads, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(spec.head_dim)
    real = np.arange(12)[None] < tiny.batch["lengths"][:, None]
    return scores * (np.tril(np.ones((12, 12))) * real[:, :, None])[:, None]


def brute_force(tiny, name: str, before, after) -> float:
    weights = {key: wide(value) for key, value in before.weights.items()}
    if name in ("q_proj", "k_proj"):
        return float(np.sum(np.square(logits(tiny, after) - logits(tiny, before))))
    if name == "o_proj":
        return sum(summed(tiny, wide(after.taps[tap]) - wide(before.taps[tap])) for tap in ("gate", "up")) / 2
    tap, through = ("o_in", "o_proj") if name == "v_proj" else ("down_in", "down_proj")
    return summed(tiny, (wide(after.taps[tap]) - wide(before.taps[tap])) @ weights[through].T)


@pytest.mark.parametrize("name", [name for name in LINEARS if name != "down_proj"])
def test_the_change_of_a_target_is_that_of_a_pruned_forward(tiny, name: str) -> None:
    weight = tiny.view.weights[name]
    mask = np.random.default_rng(1).random(weight.shape) < 0.6
    delta = output_change(tiny.view, name, jnp.where(mask, 0.0, weight))
    found = float(target_change(tiny.view, name, delta, tiny.spec))
    expected = brute_force(tiny, name, tiny.view, pruned_view(tiny, name, mask))
    assert found == pytest.approx(expected, rel=1e-4)


def test_down_and_own_outputs_change_by_inputs_times_what_goes(llama) -> None:
    removed = np.random.default_rng(2).standard_normal((16, 24)).astype(np.float32)
    expected = summed(llama, wide(llama.view.taps["down_in"]) @ wide(removed).T)
    delta = output_change(llama.view, "down_proj", jnp.asarray(removed))
    assert float(own_change(llama.view, delta)) == pytest.approx(expected, rel=1e-5)
    assert float(target_change(llama.view, "down_proj", delta, llama.spec)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LINEARS)
def test_a_single_entry_costs_what_its_row_alone_changes(tiny, name: str) -> None:
    weight = tiny.view.weights[name]
    rng = np.random.default_rng(3)
    rows, columns = rng.integers(0, weight.shape[0], 6), rng.integers(0, weight.shape[1], 6)
    found = jax.jit(entry_changes, static_argnums=(1, 4))(tiny.view, name, rows, columns, tiny.spec)
    whole = jax.jit(functools.partial(target_change, name=name, spec=tiny.spec))
    for entry, row, column in zip(found, rows, columns, strict=True):
        removed = jnp.zeros_like(weight).at[row, column].set(weight[row, column])
        expected = float(whole(tiny.view, delta=output_change(tiny.view, name, removed)))
        assert float(entry) == pytest.approx(expected, rel=1e-3)


def test_the_view_is_what_the_adapted_model_computes(llama) -> None:
    np.testing.assert_allclose(
        llama.view.taps["gate"],
        np.einsum("bti,oi->bto", wide(llama.view.taps[INPUT_OF["gate_proj"]]), wide(llama.view.weights["gate_proj"])),
        rtol=1e-4,
        atol=1e-5,
    )
    scores = jax.nn.log_softmax(forward(llama.params, llama.batch["tokens"], llama.spec, llama.adapters))
    nll = [
        -float(scores[row, place, llama.batch["tokens"][row, place + 1]])
        for row in range(3)
        for place in range(llama.batch["lengths"][row] - 1)
    ]
    assert mean_nll(llama.model, llama.view.x[:3], 1) == pytest.approx(np.mean(nll), rel=1e-5)
