"""Scores against brute force, and the reach of every matrix against plain loops over heads and dimensions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.pruning.scores import (
    activation_reach,
    foresight_score,
    loss_reach,
    ria_score,
    wanda_score,
    weight_reach,
)
from efx_jax.pruning.selection import select_mask
from efx_jax.pruning.statistics import Statistics

Arrays = dict[str, np.ndarray]
HEADS = [(4, 2), (4, 1), (3, 3)]

weight_reach_jit = jax.jit(weight_reach, static_argnums=1)
activation_reach_jit = jax.jit(activation_reach, static_argnums=3)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_wanda_is_size_times_input_norm() -> None:
    weight, norm = drawn(5, 7), np.abs(drawn(7))
    np.testing.assert_array_equal(wanda_score(weight, norm), np.abs(weight) * norm)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_ria_is_the_share_of_row_and_column_times_the_power_of_the_norm(power: float) -> None:
    weight, norm = drawn(5, 7), np.abs(drawn(7))
    weight[2], weight[:, 4], norm[1] = 0, 0, 0
    wanted = np.zeros((5, 7))
    for o, i in np.ndindex(5, 7):
        size = abs(float(weight[o, i]))
        if size:
            column = sum(abs(float(weight[k, i])) for k in range(5))
            row = sum(abs(float(weight[o, k])) for k in range(7))
            wanted[o, i] = (size / column + size / row) * float(norm[i]) ** power
    np.testing.assert_allclose(ria_score(weight, norm, power), wanted, rtol=1e-5)
    stacked = jax.jit(jax.vmap(ria_score, in_axes=(0, None, None)))(np.stack([weight, 2 * weight]), norm, power)
    np.testing.assert_allclose(stacked, [wanted, wanted], rtol=1e-5)
    for group in ("row", "matrix"):
        np.testing.assert_array_equal(select_mask(stacked[0], 0.5, group), select_mask(wanted, 0.5, group))


def test_row_foresight_is_wanda_whatever_the_reach() -> None:
    weight, norm = drawn(24, 32), np.abs(drawn(32))
    wanda = select_mask(wanda_score(weight, norm), 0.5, "row")
    for seed in range(5):
        reach = np.exp(3 * drawn(24, seed=seed))
        foresight = foresight_score(weight, norm, reach)
        np.testing.assert_array_equal(select_mask(foresight, 0.5, "row"), wanda)


def test_in_a_whole_matrix_foresight_is_not_wanda() -> None:
    weight, norm, reach = drawn(24, 32), np.abs(drawn(32)), np.exp(drawn(24))
    wanda = select_mask(wanda_score(weight, norm), 0.5, "matrix")
    assert np.mean(select_mask(foresight_score(weight, norm, reach), 0.5, "matrix") != wanda) > 0.1


def two_layer_loss(inputs: np.ndarray, first: np.ndarray, changed: np.ndarray, second: np.ndarray) -> float:
    """||X W1^T W2^T - X W1'^T W2^T||_F^2, without a factor 1/2."""
    return float(np.sum((inputs @ (first - changed).T @ second.T) ** 2))


def without(weight: np.ndarray, row: int, column: int) -> np.ndarray:
    changed = weight.copy()
    changed[row, column] = 0
    return changed


def test_the_squared_score_is_the_loss_of_dropping_that_one_weight() -> None:
    inputs, first, second = (drawn(*shape).astype(np.float64) for shape in ((20, 6), (5, 6), (4, 5)))
    score = foresight_score(
        first.astype(np.float32),
        np.sqrt((inputs**2).sum(0)).astype(np.float32),
        np.sqrt((second**2).sum(0)).astype(np.float32),
    )
    for row, column in np.ndindex(first.shape):
        exact = two_layer_loss(inputs, first, without(first, row, column), second)
        np.testing.assert_allclose(float(score[row, column]) ** 2, exact, rtol=1e-5)


def test_the_reach_to_the_loss_is_drawn_towards_its_mean() -> None:
    energy = jnp.asarray([0.0, 1.0, 4.0, 27.0])
    np.testing.assert_allclose(loss_reach(energy, 0.0), np.sqrt([0, 1, 4, 27]), rtol=1e-6)
    np.testing.assert_allclose(loss_reach(energy, 0.25), np.sqrt([2, 2.75, 5, 22.25]), rtol=1e-6)
    np.testing.assert_allclose(loss_reach(energy, 1.0), np.sqrt([8, 8, 8, 8]), rtol=1e-6)


def test_appendix_a_two_weights_look_alike_to_their_layer_and_differ_downstream() -> None:
    # The matrices of docs/method.md, which give the paper's figures; there y = x U1 U2, here W = U^T.
    inputs = np.diag([2.0, 3.0])
    first = np.array([[3.0, 1.0], [5.0, 2.0]]).T
    second = np.array([[4.0, 4.0], [4.0, 7.0]]).T
    norm, reach = np.sqrt((inputs**2).sum(0)), np.sqrt((second**2).sum(0))
    wanda = np.asarray(wanda_score(jnp.asarray(first), norm)) ** 2
    foresight = np.asarray(foresight_score(jnp.asarray(first), norm, reach)) ** 2
    for entry, local, downstream in (((0, 0), 36, 1152), ((1, 1), 36, 2340)):
        changed = without(first, *entry)
        assert two_layer_loss(inputs, first, changed, np.eye(2)) == local == wanda[entry]
        assert two_layer_loss(inputs, first, changed, second) == downstream
        np.testing.assert_allclose(foresight[entry], downstream, rtol=1e-6)


def a_block(spec: ModelSpec, seed: int = 0) -> Arrays:
    """The seven linears `[O,I]` of one block, float32."""
    d, f, q, k = spec.hidden_size, spec.intermediate_size, spec.num_heads * 4, spec.num_kv_heads * 4
    shapes = {"q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, q)}
    shapes |= {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    return {name: drawn(*shapes[name], seed=seed + i) for i, name in enumerate(LINEARS)}


def with_heads(spec: ModelSpec, heads: int, kv_heads: int) -> ModelSpec:
    return dataclasses.replace(spec, num_heads=heads, num_kv_heads=kv_heads)


def attention_reach(
    spec: ModelSpec, q_norm: Callable[[int, int], float], k_norm: Callable[[int, int], float]
) -> tuple[np.ndarray, np.ndarray]:
    """nu of q and k from the partner's norm at (head, dimension), one unit at a time."""
    heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q_reach, k_reach = np.zeros((heads, width)), np.zeros((kv_heads, width))
    for head in range(heads):
        for j in range(width):
            partners = [k_norm(head // (heads // kv_heads), dim) for dim in (j, (j + width // 2) % width)]
            q_reach[head, j] = np.sqrt((partners[0] ** 2 + partners[1] ** 2) / 2)
    for kv_head in range(kv_heads):
        served = [head for head in range(heads) if head // (heads // kv_heads) == kv_head]
        for j in range(width):
            squares = [q_norm(head, dim) ** 2 for head in served for dim in (j, (j + width // 2) % width)]
            k_reach[kv_head, j] = np.sqrt(sum(squares) / len(squares))
    return q_reach, k_reach


def reach_by_loops(block: Arrays, spec: ModelSpec) -> Arrays:
    """Appendix B and the design's table, unit by unit in float64."""
    w = {name: values.astype(np.float64) for name, values in block.items()}
    width, group = spec.head_dim, spec.num_heads // spec.num_kv_heads
    q_reach, k_reach = attention_reach(
        spec,
        lambda head, j: np.linalg.norm(w["q_proj"][head * width + j]),
        lambda head, j: np.linalg.norm(w["k_proj"][head * width + j]),
    )
    v_reach = np.zeros((spec.num_kv_heads, width))
    for kv_head, j in np.ndindex(v_reach.shape):
        columns = [w["o_proj"][:, (kv_head * group + g) * width + j] for g in range(group)]
        v_reach[kv_head, j] = np.sqrt(np.mean([column @ column for column in columns]))
    fed = range(spec.hidden_size)
    inner = np.array([np.linalg.norm(w["down_proj"][:, f]) for f in range(spec.intermediate_size)])
    return {
        "q_proj": q_reach.reshape(-1),
        "k_proj": k_reach.reshape(-1),
        "v_proj": v_reach.reshape(-1),
        "o_proj": np.array(
            [(np.linalg.norm(w["gate_proj"][:, d]) + np.linalg.norm(w["up_proj"][:, d])) / 2 for d in fed]
        ),
        "gate_proj": inner,
        "up_proj": inner,
        "down_proj": np.ones(spec.hidden_size),
    }


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_the_weight_reach_of_all_seven_matrices_equals_plain_loops(llama: Any, heads: int, kv_heads: int) -> None:
    spec = with_heads(llama.spec, heads, kv_heads)
    block = a_block(spec)
    found, wanted = weight_reach_jit(block, spec), reach_by_loops(block, spec)
    assert set(found) == set(LINEARS)
    for name in LINEARS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)


def test_grouped_queries_reach_as_far_as_multi_head_attention_with_shared_keys(llama: Any) -> None:
    spec, wide = with_heads(llama.spec, 4, 2), with_heads(llama.spec, 4, 4)
    block = a_block(spec)
    shared = {n: np.repeat(block[n].reshape(2, 4, -1), 2, axis=0).reshape(16, -1) for n in ("k_proj", "v_proj")}
    grouped, multi = weight_reach_jit(block, spec), weight_reach_jit(block | shared, wide)
    for name in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        np.testing.assert_allclose(grouped[name], multi[name], rtol=1e-6)
    for name in ("k_proj", "v_proj"):
        over_group = np.asarray(multi[name]).reshape(2, 2, 4)
        np.testing.assert_allclose(grouped[name].reshape(2, 4), np.sqrt((over_group**2).mean(1)), rtol=1e-6)


@pytest.mark.parametrize("reach_of", ["weights", "activations"])
def test_dimensions_that_rope_turns_into_each_other_share_their_reach(llama: Any, reach_of: str) -> None:
    spec = with_heads(llama.spec, 4, 2)
    block = a_block(spec)
    found = (
        weight_reach_jit(block, spec)
        if reach_of == "weights"
        else activation_reach_jit(block, {}, some_statistics(spec), spec)
    )
    for name in ("q_proj", "k_proj"):
        heads = np.asarray(found[name]).reshape(-1, 4)
        np.testing.assert_array_equal(heads[:, :2], heads[:, 2:])
        assert not np.allclose(heads[:, 0], heads[:, 1])
    v_heads = np.asarray(found["v_proj"]).reshape(-1, 4)
    assert not np.allclose(v_heads[:, :2], v_heads[:, 2:])


def some_statistics(spec: ModelSpec) -> Statistics:
    """Energies of a block that calibration might have seen."""
    d, f = spec.hidden_size, spec.intermediate_size
    units = {"attn_in": d, "o_in": spec.num_heads * 4, "mlp_in": d, "down_in": f, "gate_value": f, "gate_slope": f}
    units |= {"q": spec.num_heads * 4, "q_raw": spec.num_heads * 4}
    units |= {"k": spec.num_kv_heads * 4, "k_raw": spec.num_kv_heads * 4}
    energy = {name: jnp.asarray(np.exp(drawn(count, seed=i))) for i, (name, count) in enumerate(units.items())}
    return Statistics(energy=energy, gram={}, tokens=jnp.float32(100))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_the_activation_reach_of_all_seven_matrices_equals_plain_loops(
    llama: Any, heads: int, kv_heads: int, qk_norm: bool
) -> None:
    spec = dataclasses.replace(with_heads(llama.spec, heads, kv_heads), qk_norm=qk_norm)
    block, stats, width = a_block(spec), some_statistics(spec), spec.head_dim
    gains = {"q_norm": drawn(width, seed=11), "k_norm": drawn(width, seed=12)} if qk_norm else {}
    seen = {name: np.asarray(values, np.float64) / 100 for name, values in stats.energy.items()}
    q_reach, k_reach = attention_reach(
        spec,
        lambda head, j: np.sqrt(seen["q"][head * width + j]),
        lambda head, j: np.sqrt(seen["k"][head * width + j]),
    )
    if qk_norm:
        for own, raw, gain in ((q_reach, "q_raw", gains["q_norm"]), (k_reach, "k_raw", gains["k_norm"])):
            for head, j in np.ndindex(own.shape):
                own[head, j] *= abs(gain[j]) / np.sqrt(np.mean(seen[raw].reshape(-1, width)[head]) + spec.rms_norm_eps)
    wanted = reach_by_loops(block, spec)
    wanted |= {"q_proj": q_reach.reshape(-1), "k_proj": k_reach.reshape(-1)}
    wanted["up_proj"] = wanted["up_proj"] * np.sqrt(seen["gate_value"])
    wanted["gate_proj"] = wanted["gate_proj"] * np.sqrt(seen["gate_slope"])
    found = activation_reach_jit(block, gains, stats, spec)
    assert set(found) == set(LINEARS)
    for name in LINEARS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)


def test_a_head_of_zeros_behind_a_norm_has_a_finite_reach(llama: Any) -> None:
    spec = dataclasses.replace(with_heads(llama.spec, 4, 2), qk_norm=True)
    stats = some_statistics(spec)
    dead = {name: stats.energy[name].at[: spec.head_dim].set(0) for name in ("q", "q_raw")}
    gains = {"q_norm": drawn(spec.head_dim, seed=11), "k_norm": drawn(spec.head_dim, seed=12)}
    stats = dataclasses.replace(stats, energy=stats.energy | dead)
    reach = np.asarray(activation_reach_jit(a_block(spec), gains, stats, spec)["q_proj"])
    partner = np.sqrt(np.asarray(stats.energy["k"][: spec.head_dim]).reshape(2, -1) / 100)
    shared = np.tile(np.sqrt(np.mean(partner**2, axis=0)), 2)
    wanted = shared * np.abs(gains["q_norm"]) / np.sqrt(spec.rms_norm_eps)
    np.testing.assert_allclose(reach[: spec.head_dim], wanted, rtol=1e-5)


def test_the_activation_reach_does_not_grow_with_the_number_of_tokens(llama: Any) -> None:
    spec = with_heads(llama.spec, 4, 2)
    stats = some_statistics(spec)
    more = dataclasses.replace(stats, energy={n: 64 * e for n, e in stats.energy.items()}, tokens=64 * stats.tokens)
    found = [activation_reach_jit(a_block(spec), {}, seen, spec) for seen in (stats, more)]
    for name in LINEARS:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-6, err_msg=name)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("name", ["up_proj", "gate_proj"])
def test_for_inputs_of_one_size_the_gated_score_is_the_loss_of_a_swiglu_layer(llama: Any, name: str) -> None:
    # The score multiplies sum x^2 by the mean energy that passes the gate, which is right where |x| is constant.
    # For gate it is of first order in the dropped weight, hence weights of 1e-4 there.
    spec = llama.spec
    block, tokens = a_block(spec), 40
    if name == "gate_proj":
        block["gate_proj"] = block["gate_proj"] * np.float32(1e-4)
    inputs = np.sign(drawn(tokens, spec.hidden_size, seed=20)).astype(np.float64)
    gate, up, down = (block[n].astype(np.float64) for n in ("gate_proj", "up_proj", "down_proj"))
    opened, risen = inputs @ gate.T, inputs @ up.T
    slope = (silu(opened + 1e-6) - silu(opened - 1e-6)) / 2e-6
    stats = some_statistics(spec)
    passed = {"gate_value": (silu(opened) ** 2).sum(0), "gate_slope": ((risen * slope) ** 2).sum(0)}
    energy = stats.energy | {n: jnp.asarray(v, jnp.float32) for n, v in passed.items()}
    stats = dataclasses.replace(stats, energy=energy, tokens=jnp.float32(tokens))
    reach = activation_reach_jit(block, {}, stats, spec)[name]
    score = np.asarray(foresight_score(block[name], np.full(spec.hidden_size, np.sqrt(tokens), np.float32), reach))

    def output(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return (silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T

    for row, column in ((0, 0), (3, 5), (17, 15), (23, 8)):
        changed = without(up if name == "up_proj" else gate, row, column)
        moved = output(gate, changed) if name == "up_proj" else output(changed, up)
        exact = np.sum((moved - output(gate, up)) ** 2)
        np.testing.assert_allclose(score[row, column] ** 2, exact, rtol=1e-3)


def test_the_reach_of_a_bfloat16_model_is_summed_in_float32(llama: Any) -> None:
    half = {name: jnp.asarray(llama.params["layers"][name][0], jnp.bfloat16) for name in LINEARS}
    whole = {name: weight.astype(jnp.float32) for name, weight in half.items()}
    found, expected = weight_reach(half, llama.spec), weight_reach(whole, llama.spec)
    for name in LINEARS:
        assert found[name].dtype == jnp.float32
        np.testing.assert_array_equal(found[name], expected[name])
