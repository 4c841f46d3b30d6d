"""One linear under an adapter and a mask: forward, gradients, what is kept for the backward pass, and the merge."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import MaskForward
from efx_jax.einsum import contract
from efx_jax.errors import InputError
from efx_jax.linear import linear
from efx_jax.lora import Adapters, effective_weight, init_lora, lora_scale, masked_weight, merge
from efx_jax.model.spec import LINEARS, init_params, param_shapes, spec_from_config

OUT, IN, RANK, SCALE = 6, 10, 2, 1.7
MODES: tuple[MaskForward, ...] = ("exact", "ste", "frozen", "dense")
SPEC = spec_from_config(
    {
        "model_type": "llama",
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
)


def zeros() -> dict[str, Any]:
    """A parameter tree for functions that read shapes alone."""
    return jax.tree.map(
        lambda shape: np.zeros(shape, np.float32), param_shapes(SPEC), is_leaf=lambda shape: isinstance(shape, tuple)
    )


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, W, A, B, BIAS = normal(0, 2, 4, IN), normal(1, OUT, IN), normal(2, RANK, IN), normal(3, OUT, RANK), normal(4, OUT)
DY = normal(5, 2, 4, OUT)
MASK = jnp.asarray(np.random.default_rng(6).random((OUT, IN)) < 0.5)


def wide(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(array, np.float64) for array in arrays]


def assert_near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(np.asarray(expected)).max())


def gradients(function: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
    """Of x, W, A and B, for the cotangent DY."""
    return jax.vjp(function, X, W, A, B)[1](DY)


def test_forward_of_every_mode_equals_numpy() -> None:
    x, w, a, b, bias, mask = wide(X, W, A, B, BIAS, MASK)
    expected = {
        "exact": x @ (mask * (w + SCALE * b @ a)).T,
        "ste": x @ (mask * (w + SCALE * b @ a)).T,
        "frozen": x @ (mask * w).T + SCALE * x @ a.T @ b.T,
        "dense": x @ (w + SCALE * b @ a).T,
    }
    for mode in MODES:
        assert_near(linear(X, W, BIAS, A, B, MASK, scale=SCALE, mask_forward=mode), expected[mode] + bias)
    assert_near(linear(X, W, BIAS, A, B, scale=SCALE), expected["dense"] + bias)
    for mode in ("exact", "ste", "frozen"):
        assert_near(linear(X, W, BIAS, mask=MASK, mask_forward=mode), x @ (mask * w).T + bias)
    assert_near(linear(X, W, mask=MASK, mask_forward="dense"), x @ w.T)


def test_exact_gradients_equal_those_of_the_naive_formula() -> None:
    naive = gradients(lambda x, w, a, b: x @ jnp.where(MASK, w + SCALE * b @ a, 0.0).T)
    found = gradients(lambda x, w, a, b: linear(x, w, None, a, b, MASK, scale=SCALE))
    for one, other in zip(found, naive, strict=True):
        assert_near(one, other)


def test_exact_gradients_equal_the_closed_form_in_float64() -> None:
    x, w, a, b, mask, dy = wide(X, W, A, B, MASK, DY)
    d_effective = mask * np.einsum("bto,bti->oi", dy, x)
    expected = (dy @ (mask * (w + SCALE * b @ a)), d_effective, SCALE * b.T @ d_effective, SCALE * d_effective @ a.T)
    for one, other in zip(
        gradients(lambda x, w, a, b: linear(x, w, None, a, b, MASK, scale=SCALE)), expected, strict=True
    ):
        assert_near(one, other)


def test_pruned_entries_get_no_gradient() -> None:
    for mode in ("exact", "ste", "frozen"):
        d_weight = gradients(lambda x, w, a, b, m=mode: linear(x, w, None, a, b, MASK, mask_forward=m))[1]
        assert (np.asarray(d_weight)[~np.asarray(MASK)] == 0).all() and (
            np.asarray(d_weight)[np.asarray(MASK)] != 0
        ).all()


def test_ste_runs_exact_forward_and_trains_adapters_as_if_unmasked() -> None:
    def ste(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return linear(x, w, None, a, b, MASK, scale=SCALE, mask_forward="ste")

    exact = gradients(lambda x, w, a, b: linear(x, w, None, a, b, MASK, scale=SCALE))
    unmasked = gradients(lambda x, w, a, b: x @ w.T + SCALE * (x @ a.T) @ b.T)
    np.testing.assert_array_equal(ste(X, W, A, B), linear(X, W, None, A, B, MASK, scale=SCALE))
    for found, expected in zip(gradients(ste), (*exact[:2], *unmasked[2:]), strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("mode", ["frozen", "dense"])
def test_frozen_and_dense_gradients_equal_those_of_their_formulas(mode: MaskForward) -> None:
    base = MASK if mode == "frozen" else jnp.ones_like(MASK)
    naive = gradients(lambda x, w, a, b: x @ jnp.where(base, w, 0.0).T + SCALE * (x @ a.T) @ b.T)
    found = gradients(lambda x, w, a, b: linear(x, w, None, a, b, MASK, scale=SCALE, mask_forward=mode))
    for one, other in zip(found, naive, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_no_copy_of_the_weight_waits_for_the_backward_pass(mode: MaskForward, dropping: bool) -> None:
    key = jax.random.key(0) if dropping else None

    def adapted(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"mask_forward": mode, "compute_dtype": "bfloat16"}
        return linear(x, W, None, a, b, MASK, scale=SCALE, dropout_rate=0.1, dropout_key=key, **options)

    residuals = jax.tree.leaves(jax.vjp(adapted, X, A, B)[1])
    copies = [r for r in residuals if r.shape == W.shape and jnp.issubdtype(r.dtype, jnp.floating)]
    # The adapter's own masked product under dropout has a weight of zeros, one for all layers.
    copies = [r for r in copies if r.any()]
    assert len(copies) == 1
    np.testing.assert_array_equal(copies[0], W)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_of_rate_zero_or_without_a_key_is_none(mode: MaskForward) -> None:
    plain = linear(X, W, None, A, B, MASK, mask_forward=mode)
    key = jax.random.key(0)
    np.testing.assert_array_equal(linear(X, W, None, A, B, MASK, mask_forward=mode, dropout_key=key), plain)
    np.testing.assert_array_equal(linear(X, W, None, A, B, MASK, mask_forward=mode, dropout_rate=0.5), plain)


@pytest.mark.parametrize("mode", ["exact", "dense"])
def test_dropout_keeps_the_expectation_and_drops_the_adapters_input_alone(mode: MaskForward) -> None:
    def dropped(key: jax.Array) -> jax.Array:
        return linear(X, W, None, A, B, MASK, scale=SCALE, mask_forward=mode, dropout_rate=0.25, dropout_key=key)

    draws = np.asarray(jax.vmap(dropped)(jax.random.split(jax.random.key(1), 4000)))
    plain = np.asarray(linear(X, W, None, A, B, MASK, scale=SCALE, mask_forward=mode))
    assert (np.abs(draws.mean(0) - plain) < 5 * draws.std(0) / math.sqrt(len(draws))).all()
    assert draws.std(0).min() > 0.1
    without = linear(X, W, None, A, 0 * B, MASK, mask_forward=mode, dropout_rate=0.25, dropout_key=jax.random.key(2))
    assert_near(without, linear(X, W, None, A, 0 * B, MASK, mask_forward=mode))


def test_dropout_lets_nothing_through_the_mask() -> None:
    nothing = jnp.zeros_like(MASK)
    for mode in ("exact", "ste"):
        y = linear(X, W, None, A, B, nothing, mask_forward=mode, dropout_rate=0.5, dropout_key=jax.random.key(0))
        assert not np.asarray(y).any()


def test_dropout_gradients_equal_those_of_the_naive_formula() -> None:
    key = jax.random.key(3)
    kept = jax.random.bernoulli(key, 0.75, X.shape) / 0.75

    def naive(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return x @ jnp.where(MASK, w, 0.0).T + (x * kept) @ jnp.where(MASK, SCALE * b @ a, 0.0).T

    found = gradients(
        lambda x, w, a, b: linear(x, w, None, a, b, MASK, scale=SCALE, dropout_rate=0.25, dropout_key=key)
    )
    for one, other in zip(found, gradients(naive), strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_result_and_gradients_keep_the_dtypes_of_their_arrays(mode: MaskForward) -> None:
    x, w = X.astype("bfloat16"), W.astype("bfloat16")
    y, backward = jax.vjp(lambda *arrays: linear(*arrays[:2], None, *arrays[2:], MASK, mask_forward=mode), x, w, A, B)
    assert y.dtype == jnp.bfloat16
    assert [d.dtype for d in backward(DY.astype("bfloat16"))] == [x.dtype, w.dtype, A.dtype, B.dtype]
    assert linear(X, w, None, A, B, MASK, mask_forward=mode).dtype == jnp.float32


def test_bfloat16_operands_round_the_effective_weight_once() -> None:
    found = linear(X, W, None, A, B, MASK, scale=SCALE, compute_dtype="bfloat16")
    effective = masked_weight(W, A, B, MASK, SCALE).astype("bfloat16").astype("float32")
    assert_near(found, X.astype("bfloat16").astype("float32") @ effective.T)


def test_linear_runs_under_vmap_over_layers() -> None:
    stacked = [jnp.stack([array, 2 * array]) for array in (X, W, A, B)]

    def total(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(linear(x, w, None, a, b, MASK, scale=SCALE) ** 2)

    found = jax.vmap(jax.grad(total, argnums=(0, 1, 2, 3)))(*stacked)
    for layer in range(2):
        expected = jax.grad(total, argnums=(0, 1, 2, 3))(*(array[layer] for array in stacked))
        for one, other in zip(found, expected, strict=True):
            assert_near(one[layer], other)


@pytest.mark.parametrize(
    ("equation", "x_shape", "y_shape"),
    [
        ("...i,oi->...o", (2, 3, 5), (4, 5)),
        ("btkgh,bskh->bkgts", (2, 3, 2, 2, 4), (2, 5, 2, 4)),
        ("bkgts,bskh->btkgh", (2, 2, 2, 3, 5), (2, 5, 2, 4)),
        ("btd,vd->btv", (2, 3, 4), (6, 4)),
    ],
)
def test_contract_differentiates_like_einsum(equation: str, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    x, y = normal(0, *x_shape), normal(1, *y_shape)
    z, backward = jax.vjp(lambda x, y: contract(equation, x, y), x, y)
    expected, plain = jax.vjp(lambda x, y: jnp.einsum(equation, x, y), x, y)
    dz = normal(2, *z.shape)
    for found, other in zip((z, *backward(dz)), (expected, *plain(dz)), strict=True):
        assert_near(found, other)
    half, backward = jax.vjp(lambda x, y: contract(equation, x, y), x.astype("bfloat16"), y.astype("bfloat16"))
    assert half.dtype == jnp.float32
    assert {d.dtype.name for d in backward(dz)} == {"bfloat16"}


def test_effective_weight_holds_the_scale_once() -> None:
    w, a, b = wide(W, A, B)
    assert_near(effective_weight(W, A, B, SCALE), w + SCALE * b @ a)
    np.testing.assert_array_equal(effective_weight(W, None, None, SCALE), W)
    assert effective_weight(W.astype("bfloat16"), A, B, SCALE).dtype == jnp.float32


def test_scale_is_alpha_over_rank_or_its_root() -> None:
    assert lora_scale(8, 16) == 2.0
    assert lora_scale(16, 16, rslora=True) == 4.0
    for rslora, scale in ((False, 3.0), (True, 6.0)):
        adapters = init_lora(jax.random.key(1), zeros(), SPEC, rank=4, alpha=12, targets=["q_proj"], rslora=rslora)
        assert adapters.scale == scale


def test_fresh_adapters_leave_the_model_as_it_is() -> None:
    params = jax.tree.map(lambda x: x + 1.0, zeros())
    adapters = init_lora(jax.random.key(1), params, SPEC, rank=3)
    assert set(adapters.lora_a) == set(adapters.lora_b) == set(LINEARS)
    for name in LINEARS:
        layers, out_dim, in_dim = params["layers"][name].shape
        lora_a = np.asarray(adapters.lora_a[name])
        assert lora_a.shape == (layers, 3, in_dim) and adapters.lora_b[name].shape == (layers, out_dim, 3)
        assert 0.8 / math.sqrt(in_dim) < np.abs(lora_a).max() <= 1 / math.sqrt(in_dim)
        assert not np.asarray(adapters.lora_b[name]).any()
        np.testing.assert_array_equal(merge(params, adapters, None)["layers"][name], params["layers"][name])
    assert not np.array_equal(adapters.lora_a["q_proj"], adapters.lora_a["k_proj"])
    assert not np.array_equal(adapters.lora_a["q_proj"][0], adapters.lora_a["q_proj"][1])


def test_same_key_draws_the_same_adapters() -> None:
    params = zeros()
    one, same, other = (
        init_lora(jax.random.key(seed), params, SPEC, targets=["up_proj"]).lora_a["up_proj"] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_adapters_of_chosen_linears_alone() -> None:
    params = zeros()
    adapters = init_lora(jax.random.key(1), params, SPEC, targets=("v_proj", "q_proj"))
    assert set(adapters.lora_a) == set(adapters.lora_b) == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"targets": ["q_proj", "w_proj"]}, "w_proj"),
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0}, "alpha 0"),
        ({"targets": ["norm"]}, "norm"),
    ],
)
def test_unknown_target_or_rank_is_refused_in_one_line(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        init_lora(jax.random.key(0), zeros(), SPEC, **change)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merge_rounds_once_keeps_dtypes_and_leaves_exact_zeros(dtype: str) -> None:
    params = init_params(jax.random.key(0), SPEC, dtype)
    adapters: Adapters = init_lora(jax.random.key(1), params, SPEC, rank=2, targets=("q_proj", "down_proj"))
    adapters = adapters.replace(lora_b=jax.tree.map(lambda b: b + 0.1, adapters.lora_b))
    rng = np.random.default_rng(0)
    masks = {name: jnp.asarray(rng.random(params["layers"][name].shape) < 0.5) for name in ("q_proj", "up_proj")}
    merged = merge(params, adapters, masks)
    for name in LINEARS:
        found, weight = np.asarray(merged["layers"][name]), params["layers"][name]
        u = effective_weight(weight, adapters.lora_a.get(name), adapters.lora_b.get(name), adapters.scale)
        kept = np.asarray(masks.get(name, jnp.ones(weight.shape, bool)))
        assert found.dtype == weight.dtype
        np.testing.assert_array_equal(found, np.where(kept, np.asarray(u.astype(dtype)), np.zeros((), found.dtype)))
        assert (found[~kept] == 0).all() and not np.signbit(found[~kept].astype(np.float32)).any()
    assert merged["layers"]["gate_proj"] is params["layers"]["gate_proj"]
    assert merged["embed_tokens"] is params["embed_tokens"] and set(merged) == set(params)


def test_merge_without_adapters_or_masks_changes_nothing() -> None:
    params = init_params(jax.random.key(0), SPEC)
    merged = merge(params, None, None)
    assert all(one is other for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))


def test_an_unknown_mask_mode_is_refused() -> None:
    with pytest.raises(InputError, match="mask_forward must be one of exact, ste, frozen, dense, found 'Exact'"):
        linear(jnp.ones((1, 4)), jnp.ones((2, 4)), mask_forward="Exact")  # type: ignore[arg-type]


def test_adapters_that_do_not_fit_their_linear_are_refused() -> None:
    params = zeros()
    fits = init_lora(jax.random.key(1), params, SPEC, rank=3, targets=("up_proj",))
    a, b = fits.lora_a["up_proj"], fits.lora_b["up_proj"]
    merge(params, fits, None)
    for lora_a, lora_b in ((a[0], b[0]), (a[:1], b[:1]), (a[..., :1], b), (a, b[..., :1]), (a, b[:, :1])):
        with pytest.raises(InputError, match=r"adapter of up_proj: expected A \[L,R,I\] and B \[L,O,R\]"):
            merge(params, Adapters({"up_proj": lora_a}, {"up_proj": lora_b}, fits.scale), None)
    with pytest.raises(InputError, match="found only one of up_proj"):
        merge(params, Adapters({"up_proj": a}, {}, fits.scale), None)
