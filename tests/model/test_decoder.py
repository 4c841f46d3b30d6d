"""The whole decoder under adapters and masks, and the invariances that training rests on."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import MaskForward
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, merge
from efx_jax.model.decoder import forward, head_weight, hidden_states
from efx_jax.model.spec import LINEARS, linear_shapes, param_shapes, spec_from_config

SPEC = spec_from_config(
    {
        "model_type": "qwen3",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
jitted_hidden = jax.jit(lambda params, tokens: hidden_states(params, tokens, SPEC))
jitted_forward = jax.jit(forward, static_argnames=("spec", "mask_forward", "compute_dtype"))


def drawn(seed: int, shapes: Any, scale: float) -> Any:
    """Normal arrays drawn by numpy, where nothing compiles."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    return jax.tree.map(draw, shapes, is_leaf=lambda shape: isinstance(shape, tuple))


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return drawn(0, param_shapes(SPEC), 0.2)


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    linears = linear_shapes(SPEC).items()
    lora_a = drawn(1, {name: (SPEC.num_layers, 2, columns) for name, (_, columns) in linears}, 0.2)
    lora_b = drawn(2, {name: (SPEC.num_layers, rows, 2) for name, (rows, _) in linears}, 0.5)
    return Adapters(lora_a=lora_a, lora_b=lora_b, scale=1.5)


@pytest.fixture(scope="module")
def masks() -> dict[str, jax.Array]:
    rng = np.random.default_rng(3)
    return {
        name: jnp.asarray(rng.random((SPEC.num_layers, *shape)) < 0.5) for name, shape in linear_shapes(SPEC).items()
    }


def assert_near(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(np.asarray(expected)).max())


def only(tree: Mapping[str, jax.Array], kept: str, other: bool | float) -> dict[str, jax.Array]:
    """The same shapes, so that nothing compiles again: every array but one is filled with `other`."""
    return {name: x if name == kept else jnp.full_like(x, other) for name, x in tree.items()}


@pytest.mark.parametrize("name", LINEARS)
def test_merged_linear_equals_its_adapter_under_its_mask(
    name: str, params: dict[str, Any], adapters: Adapters, masks: dict[str, jax.Array]
) -> None:
    one_adapter = adapters.replace(lora_b=only(adapters.lora_b, name, 0.0))
    one_mask = only(masks, name, True)
    found = jitted_forward(params, TOKENS, SPEC, one_adapter, one_mask)
    merged = merge(params, one_adapter, one_mask)
    assert_near(found, jitted_forward(merged, TOKENS, SPEC))
    for changed in (merge(params, one_adapter, None), merge(params, None, one_mask)):
        assert np.abs(found - jitted_forward(changed, TOKENS, SPEC)).max() > 1e-3
    assert (np.asarray(merged["layers"][name]) == 0).mean() == pytest.approx(1 - np.asarray(masks[name]).mean())


def test_merged_model_equals_the_masked_adapted_one(
    params: dict[str, Any], adapters: Adapters, masks: dict[str, jax.Array]
) -> None:
    expected = jitted_forward(merge(params, adapters, masks), TOKENS, SPEC)
    assert_near(jitted_forward(params, TOKENS, SPEC, adapters, masks), expected)
    assert_near(jitted_forward(params, TOKENS, SPEC, adapters, masks, mask_forward="ste"), expected)
    unmasked = jitted_forward(merge(params, adapters, None), TOKENS, SPEC)
    assert_near(jitted_forward(params, TOKENS, SPEC, adapters, masks, mask_forward="dense"), unmasked)


def test_adapters_and_masks_may_cover_a_subset(
    params: dict[str, Any], adapters: Adapters, masks: dict[str, jax.Array]
) -> None:
    some = adapters.replace(
        lora_a={name: adapters.lora_a[name] for name in ("q_proj", "up_proj")},
        lora_b={name: adapters.lora_b[name] for name in ("q_proj", "up_proj")},
    )
    few = {name: masks[name] for name in ("up_proj", "down_proj")}
    found = jitted_forward(params, TOKENS, SPEC, some, few)
    assert_near(found, jitted_forward(merge(params, some, few), TOKENS, SPEC))


def loss_of(logits: jax.Array) -> jax.Array:
    return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1][..., 7])


@pytest.mark.parametrize("mask_forward", ["exact", "frozen", "dense"])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.1])
def test_no_copy_of_the_weights_waits_for_the_backward_pass(
    mask_forward: MaskForward,
    dropout_rate: float,
    params: dict[str, Any],
    adapters: Adapters,
    masks: dict[str, jax.Array],
) -> None:
    def hidden(adapters: Adapters) -> jax.Array:
        options: dict[str, Any] = {"mask_forward": mask_forward, "compute_dtype": "bfloat16"}
        options |= {"dropout_rate": dropout_rate, "dropout_key": jax.random.key(0)}
        return hidden_states(params, TOKENS, SPEC, adapters, masks, **options)

    def residuals(adapters: Adapters) -> Any:
        return jax.tree.leaves(jax.vjp(hidden, adapters)[1])

    weights = {params["layers"][name].shape for name in LINEARS}
    held = [leaf for leaf in jax.eval_shape(residuals, adapters) if leaf.shape in weights and leaf.dtype != bool]
    assert {leaf.dtype.name for leaf in held} == {"float32"}
    assert len(held) == len(LINEARS)


def test_dropout_differs_between_layers_linears_and_keys(params: dict[str, Any], adapters: Adapters) -> None:
    @jax.jit
    def dropped(seed: int, adapters: Adapters) -> jax.Array:
        key = jax.random.key(seed)
        return hidden_states(params, TOKENS, SPEC, adapters, dropout_rate=0.5, dropout_key=key)

    def layer_alone(layer: int, name: str) -> Adapters:
        lora_b = {n: b.at[jnp.arange(3) != layer].set(0) if n == name else 0 * b for n, b in adapters.lora_b.items()}
        return adapters.replace(lora_b=lora_b)

    np.testing.assert_array_equal(dropped(0, adapters), dropped(0, adapters))
    assert np.abs(dropped(0, adapters) - dropped(1, adapters)).max() > 1e-2
    # gate and up read the same inputs: with one mask for both, equal adapters would act as one.
    shared = adapters.replace(lora_a=adapters.lora_a | {"up_proj": adapters.lora_a["gate_proj"]})
    gate, up = (dropped(0, shared.replace(lora_b=layer_alone(2, n).lora_b)) for n in ("gate_proj", "up_proj"))
    assert np.abs(gate - up).max() > 1e-3


def test_a_token_changes_nothing_before_it(params: dict[str, Any]) -> None:
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % SPEC.vocab_size
    before, after = (np.asarray(jitted_forward(params, tokens, SPEC)) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after)[:, 5:].max(-1) > 1e-4).all()


def test_forward_is_traced_once_for_new_weights_adapters_and_masks(
    params: dict[str, Any], adapters: Adapters, masks: dict[str, jax.Array]
) -> None:
    @jax.jit
    @chex.assert_max_traces(n=1)
    def counted(params: Any, tokens: jax.Array, adapters: Adapters, masks: Any) -> jax.Array:
        return forward(params, tokens, SPEC, adapters, masks)

    first = counted(params, TOKENS, adapters, masks)
    flipped = {name: ~mask for name, mask in masks.items()}
    doubled = jax.tree.map(lambda x: 2 * x, adapters)
    assert not np.allclose(counted(jax.tree.map(lambda x: x + 1, params), TOKENS + 1, doubled, flipped), first)
    with pytest.raises(AssertionError, match="traced"):
        counted(params, TOKENS[:, :5], adapters, masks)


def test_logits_are_float32_of_every_position(params: dict[str, Any]) -> None:
    logits = jitted_forward(params, TOKENS, SPEC)
    assert logits.shape == (2, 9, 40) and logits.dtype == jnp.float32


def test_bfloat16_operands_stay_near_float32(params: dict[str, Any]) -> None:
    exact = np.asarray(jitted_forward(params, TOKENS, SPEC))
    rounded = np.asarray(jitted_forward(params, TOKENS, SPEC, compute_dtype="bfloat16"))
    error = np.sqrt(np.mean((exact - rounded) ** 2) / np.mean(exact**2))
    assert 0 < error < 3 * float(jnp.finfo("bfloat16").eps)


@pytest.fixture(scope="module")
def gradients(params: dict[str, Any], adapters: Adapters, masks: dict[str, jax.Array]) -> Any:
    """Of the adapters and the weights, through the masked linears."""

    @jax.jit
    def direct(adapters: Adapters, params: Any) -> Any:
        return jax.grad(lambda a, p: loss_of(forward(p, TOKENS, SPEC, a, masks)), argnums=(0, 1))(adapters, params)

    return direct(adapters, params)


def test_gradients_through_the_model_equal_those_through_the_merged_one(
    gradients: Any, params: dict[str, Any], adapters: Adapters, masks: dict[str, jax.Array]
) -> None:
    @jax.jit
    def naive(adapters: Adapters, params: Any) -> Any:
        def loss(adapters: Adapters, params: Any) -> jax.Array:
            return loss_of(forward(merge(params, adapters, masks), TOKENS, SPEC))

        return jax.grad(loss, argnums=(0, 1))(adapters, params)

    for found, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(naive(adapters, params)), strict=True):
        assert np.abs(np.asarray(expected)).max() > 0
        assert_near(found, expected)


def test_recomputing_blocks_changes_no_gradient(
    gradients: Any, params: dict[str, Any], adapters: Adapters, masks: dict[str, jax.Array]
) -> None:
    @jax.jit
    def recomputed(adapters: Adapters) -> Any:
        def loss(adapters: Adapters) -> jax.Array:
            return loss_of(hidden_states(params, TOKENS, SPEC, adapters, masks, remat="block") @ head_weight(params).T)

        return jax.grad(loss)(adapters)

    for found, expected in zip(jax.tree.leaves(recomputed(adapters)), jax.tree.leaves(gradients[0]), strict=True):
        assert_near(found, expected)


@jax.jit
def hidden_at(params: Any, tokens: Any, positions: Any, segments: Any = None, ends: Any = None) -> jax.Array:
    return hidden_states(params, tokens, SPEC, positions=positions, segments=segments, ends=ends)


def one_per_row(*sequences: np.ndarray) -> np.ndarray:
    """Right-padded tokens [3, 13]."""
    rows = np.zeros((3, 13), np.int32)
    for row, sequence in zip(rows, sequences, strict=False):
        row[: len(sequence)] = sequence
    return rows


def test_packed_segments_equal_separate_sequences(params: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    pieces = [rng.integers(0, 40, size).astype(np.int32) for size in (4, 2, 5)]
    alone = jitted_hidden(params, one_per_row(*pieces))
    tokens = one_per_row(np.concatenate(pieces))
    positions, segments = one_per_row(np.concatenate([np.arange(4), np.arange(2), np.arange(5)])), np.full((3, 13), -1)
    segments[0, :11] = np.repeat([1, 2, 3], [4, 2, 5])
    packed = hidden_at(params, tokens, positions, segments)
    for place, row in ((slice(0, 4), 0), (slice(4, 6), 1), (slice(6, 11), 2)):
        assert_near(packed[0, place], alone[row, : place.stop - place.start])
    assert np.isfinite(np.asarray(packed)).all()
    assert np.abs(packed - jitted_hidden(params, tokens))[0, 4:11].max() > 1e-2


def test_a_shared_prefix_equals_repeating_it(params: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    prefix, *branches = (rng.integers(0, 40, size).astype(np.int32) for size in (4, 3, 2))
    positions = one_per_row(np.concatenate([np.arange(7), 4 + np.arange(2)]))
    ends = np.tile(np.arange(1, 14), (3, 1))
    ends[0, :9] = np.repeat([9, 7, 9], [4, 3, 2])
    shared = hidden_at(params, one_per_row(np.concatenate([prefix, *branches])), positions, ends=ends)
    alone = jitted_hidden(params, one_per_row(*(np.concatenate([prefix, branch]) for branch in branches)))
    assert_near(shared[0, 4:7], alone[0, 4:7])
    assert_near(shared[0, 7:9], alone[1, 4:6])


@pytest.mark.parametrize("through", ["forward", "merge"])
def test_a_mask_that_belongs_to_no_linear_is_refused(params: dict[str, Any], through: str) -> None:
    whole = jnp.ones(params["layers"]["q_proj"].shape, bool)
    for masks, complaint in (
        ({"q": whole}, "masks: expected names among .*, found q"),
        ({"q_proj": whole[0]}, r"mask of q_proj: expected \[L,O,I\]"),
    ):
        with pytest.raises(InputError, match=complaint):
            merge(params, None, masks) if through == "merge" else forward(params, TOKENS, SPEC, masks=masks)
