"""The exact merge against arithmetic in Python: fractions for the rounding, IEEE doubles one by one for the sum."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from efx_jax.config import MeshConfig
from efx_jax.lora import Adapters, merge
from efx_jax.model.spec import LINEARS, ModelSpec, param_shapes
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import tree_shardings
from efx_jax.weights.byte_ranges import whole
from efx_jax.weights.merged import merged_rows, merged_source, round_once
from efx_jax.weights.params import params_source
from tests.tiny import EVEN, LLAMA

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Bits of the significand, least exponent of a normal number, largest number.
FORMATS = {"float32": (24, -126, 127), "bfloat16": (8, -126, 127), "float16": (11, -14, 15)}


def nearest(value: float, dtype: str) -> float:
    """The number of a format that is nearest, ties to even, exactly; infinity beyond its range."""
    bits, low, high = FORMATS[dtype]
    exact = abs(Fraction(value))
    if exact == 0:
        return value
    exponent = low
    while Fraction(2) ** (exponent + 1) <= exact:
        exponent += 1
    step = Fraction(2) ** (exponent - bits + 1)
    # Python rounds a fraction half to even.
    rounded = round(exact / step) * step
    limit = Fraction(2) ** (high + 1)
    size = float("inf") if rounded >= limit else float(rounded)
    return size if value > 0 else -size


def awkward(dtype: str) -> np.ndarray:
    """Ties, what lies just beside one, subnormal numbers, the ends of the range, and random numbers."""
    bits, low, high = FORMATS[dtype]
    rng = np.random.default_rng(0)
    values = [0.0, 2.0**low, 2.0 ** (low - bits + 1), 2.0 ** (low - bits), 2.0**-160, 2.0**high, 2.0 ** (high + 1)]
    values += [(2 - 2.0**-bits) * 2.0**high, (2 - 2.0**-bits - 2.0**-50) * 2.0**high]
    for scale in (1.0, 2.0 ** (low + 1), 2.0 ** (low - bits + 4)):
        for mantissa in range(16, 32):
            for beside in (0.0, 2.0**-40, -(2.0**-40)):
                values.append(scale * (mantissa / 16 + 2.0**-bits + beside))
                values.append(scale * (mantissa / 16 + 2.0 ** (1 - bits) + 2.0**-bits + beside))
    values += list(rng.standard_normal(200) * 10.0 ** rng.integers(-8, 4, 200))
    return np.array([*values, *(-value for value in values)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_is_rounded_once_to_the_nearest_even(dtype: str) -> None:
    values = awkward(dtype)
    found = round_once(values, DTYPES[dtype])
    assert found.dtype == DTYPES[dtype]
    expected = np.array([nearest(float(value), dtype) for value in values])
    np.testing.assert_array_equal(found.astype(np.float64), expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(values))


def test_rounding_by_way_of_float32_would_be_wrong() -> None:
    """What `round_once` is for: else it could go."""
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert round_once(value, DTYPES["bfloat16"]) == 1 + 2.0**-7
    assert value.astype(np.float32).astype(DTYPES["bfloat16"]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_sum_is_that_of_doubles_added_in_order(dtype: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(rank)
    weight = rng.standard_normal((9, 13)).astype(DTYPES[dtype])
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, 13), (9, rank)))
    kept, scale = rng.random((9, 13)) < 0.5, 0.7
    expected = np.zeros((9, 13))
    for o, i in np.ndindex(9, 13):
        total = 0.0
        for r in range(rank):
            total += float(b[o, r]) * float(a[r, i])
        expected[o, i] = nearest(float(weight[o, i]) + scale * total, dtype) if kept[o, i] else 0.0
    for entries in (1, 40, 1 << 15):
        monkeypatch.setattr("efx_jax.weights.merged._BLOCK_ENTRIES", entries)
        found = merged_rows(weight, a, b, kept, scale)
        assert found.dtype == weight.dtype
        np.testing.assert_array_equal(found.astype(np.float64), expected)
    assert not np.signbit(found[~kept]).any()


def test_without_an_adapter_the_weights_keep_their_bits() -> None:
    weight = np.array([[-0.0, 1e-40, 3.0], [0.1, 0.2, -0.3]], np.float32)
    assert merged_rows(weight, None, None, None, 0.0).tobytes() == weight.tobytes()
    kept = np.array([[True, True, False], [False, True, True]])
    found = merged_rows(weight, None, None, kept, 0.0)
    assert found.view(np.uint32)[kept].tolist() == weight.view(np.uint32)[kept].tolist()
    assert (found.view(np.uint32)[~kept] == 0).all()


def expert(spec: ModelSpec, dtype: str = "float32") -> tuple[dict[str, Any], Adapters, dict[str, np.ndarray]]:
    """Parameters, adapters that matter, and masks in bits for all linears but two, one of them without adapter."""
    rng = np.random.default_rng(0)
    shapes = param_shapes(spec)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    params = {name: draw(shape) for name, shape in shapes.items() if name != "layers"}
    params["layers"] = {name: draw(shape) for name, shape in shapes["layers"].items()}
    linears = {name: shapes["layers"][name] for name in LINEARS if name != "k_proj"}
    adapters = Adapters(
        lora_a={name: rng.random((count, 3, i), np.float32) for name, (count, _, i) in linears.items()},
        lora_b={name: 0.1 * rng.random((count, o, 3), np.float32) for name, (count, o, _) in linears.items()},
        scale=5 / 3,
    )
    kept = {name: rng.random(shape) < 0.5 for name, shape in linears.items() if name != "o_proj"}
    return params, adapters, {name: np.packbits(k, axis=-1, bitorder="little") for name, k in kept.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_source_is_the_merge_to_one_rounding(dtype: str) -> None:
    """`efx_jax.merge` sums in float32: rank + 2 roundings of the terms apart; 16 bits may then take the next number."""
    params, adapters, masks = expert(LLAMA, dtype)
    source = merged_source(params_source(params, LLAMA, Path("x")), LLAMA, adapters, masks)
    layers = merge(*jax.tree.map(jnp.asarray, (params, adapters, masks)))["layers"]
    step = 0.0 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    for name in LINEARS:
        module = f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}"
        for layer in range(2):
            found = source.read(f"model.layers.{layer}.{module}.weight")
            expected = np.asarray(layers[name][layer])
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found == 0, expected == 0)
            found, expected = found.astype(np.float64), expected.astype(np.float64)
            terms = np.abs(np.asarray(params["layers"][name][layer], np.float64))
            if name in adapters.lora_a:
                a, b = adapters.lora_a[name][layer], adapters.lora_b[name][layer]
                terms += adapters.scale * (b.astype(np.float64) @ a)
            assert (np.abs(found - expected) <= 5 * 2.0**-24 * terms + step * np.abs(expected)).all()


def test_parts_and_shards_are_those_of_the_whole() -> None:
    params, adapters, masks = expert(EVEN)
    base = params_source(params, EVEN, Path("x"))
    whole_source = merged_source(base, EVEN, adapters, masks)
    bare = {name: np.unpackbits(mask, axis=-1, bitorder="little").astype(bool) for name, mask in masks.items()}
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        expected = whole_source.read(name)
        rows, columns = slice(3, 9), slice(5, 27)
        np.testing.assert_array_equal(whole_source.read_part(name, (rows, columns)), expected[rows, columns])
        np.testing.assert_array_equal(merged_source(base, EVEN, adapters, bare).read(name), expected)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = [jax.device_put(tree, tree_shardings(mesh, tree)) for tree in (params, adapters, masks)]
    with jax.set_mesh(mesh):
        sharded = merged_source(params_source(placed[0], EVEN, Path("x")), EVEN, placed[1], placed[2])
        for name, shape in sharded.shapes.items():
            parts = sharded.parts(name)
            assert len(parts) == (4 if name.endswith(("_proj.weight", "embed_tokens.weight")) else 1)
            found = np.empty(shape, np.float32)
            for part in parts:
                found[part] = sharded.read_part(name, part)
            np.testing.assert_array_equal(found, whole_source.read_part(name, whole(shape)))
