"""The parts of a block against loops and formulas in numpy."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.model.layers import (
    apply_rope,
    rms_norm,
    rope_frequencies,
    rope_tables,
    swiglu,
)
from efx_jax.model.rope import RopeSpec


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    x, gain = normal(0, 3, 8), normal(1, 8)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(rms_norm(x, gain, 1e-5), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rms_norm_of_half_precision_is_rounded_once(dtype: str) -> None:
    x, gain = jnp.asarray(100 * normal(0, 64, 32), dtype), jnp.asarray(normal(1, 32), dtype)
    found = rms_norm(x, gain, 1e-5)
    assert found.dtype == dtype
    wide = rms_norm(x.astype("float32"), gain.astype("float32"), 1e-5)
    np.testing.assert_array_equal(found.astype("float32"), wide.astype(dtype).astype("float32"))


def test_rms_norm_squares_beyond_the_range_of_float16() -> None:
    x = jnp.full((1, 4), 300.0, "float16")
    np.testing.assert_array_equal(rms_norm(x, jnp.ones(4, "float16"), 1e-5), np.ones((1, 4)))


def test_swiglu_is_silu_of_gate_times_up() -> None:
    gate, up = normal(0, 3, 8), normal(1, 3, 8)
    np.testing.assert_allclose(swiglu(gate, up), gate / (1 + np.exp(-gate)) * up, rtol=1e-5)
    assert swiglu(jnp.asarray(gate, "bfloat16"), jnp.asarray(up, "bfloat16")).dtype == jnp.bfloat16


def test_rope_turns_pair_j_with_j_plus_half_by_position_times_frequency() -> None:
    width, rope = 8, RopeSpec(theta=100.0)
    x, positions = normal(0, 1, 3, 2, width), np.asarray([[0, 3, 11]])
    found = np.asarray(apply_rope(x, *rope_tables(rope, width, jnp.asarray(positions))))
    for t, n, j in itertools.product(range(3), range(2), range(width // 2)):
        angle = positions[0, t] * 100.0 ** (-2 * j / width)
        turned = complex(x[0, t, n, j], x[0, t, n, j + width // 2]) * complex(math.cos(angle), math.sin(angle))
        np.testing.assert_allclose(found[0, t, n, [j, j + width // 2]], [turned.real, turned.imag], atol=1e-5)


def test_scores_of_rotated_queries_and_keys_depend_on_the_distance_alone() -> None:
    q, k = normal(0, 1, 1, 1, 16), normal(1, 1, 1, 1, 16)

    def score(query_position: int, key_position: int) -> float:
        at = [rope_tables(RopeSpec(), 16, jnp.asarray([[position]])) for position in (query_position, key_position)]
        return float(jnp.sum(apply_rope(q, *at[0]) * apply_rope(k, *at[1])))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_frequencies_fall_from_one() -> None:
    frequencies, factor = rope_frequencies(RopeSpec(theta=5e5), 64)
    assert frequencies[0] == 1.0 and factor == 1.0 and frequencies.dtype == np.float32
    assert (np.diff(frequencies) < 0).all()
    np.testing.assert_allclose(frequencies, 5e5 ** (-np.arange(32) / 32), rtol=1e-6)


def test_scaled_frequencies_keep_the_fast_ones_and_divide_the_slow_ones() -> None:
    plain, _ = rope_frequencies(RopeSpec(theta=5e5), 128)
    for rope_type in ("llama3", "yarn"):
        scaled, _ = rope_frequencies(RopeSpec(rope_type, 5e5, 8.0, 8192), 128)
        ratio = plain / scaled
        assert ratio[0] == 1.0 and ratio[-1] == 8.0
        assert (np.diff(ratio) > -1e-5).all() and ((ratio > 1.01) & (ratio < 7.99)).any()
    linear, _ = rope_frequencies(RopeSpec("linear", 5e5, 8.0), 128)
    np.testing.assert_array_equal(linear * 8, plain)


def test_a_yarn_ramp_without_a_width_is_a_step() -> None:
    """Of six tokens not even the fastest pair turns once, so that the ramp begins and ends at it."""
    scaled, _ = rope_frequencies(RopeSpec("yarn", 1e4, 4.0, 6), 16)
    plain, _ = rope_frequencies(RopeSpec(theta=1e4), 16)
    np.testing.assert_allclose(plain / scaled, [1] + 7 * [4], rtol=1e-6)
