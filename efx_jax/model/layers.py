"""The parts of a decoder block: RMS norm, rotary embedding and SwiGLU, as plain functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.model.rope import RopeSpec, yarn_attention_factor

Array = jax.Array


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / rms(x) * gain over the last axis, the mean square in float32; `x [...,D]`, `gain [D]`, dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * gain.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(rope: RopeSpec, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies `[H/2]` in radians per position, and the factor on cos and sin.

    Every step is float32, in the order of transformers' `modeling_rope_utils`: a detour through float64 moves the angle
    by 5e-4 rad at position 9,000. Only the power is rounded from float64: torch without SIMD gives these bits, while
    numpy's float32 power depends on the CPU. Llama-3 scaling as in Meta's release, YaRN as in arXiv 2309.00071.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / periods
    if rope.rope_type == "linear":
        return frequencies / np.float32(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, frequencies), 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, periods, head_dim), yarn_attention_factor(rope)
    return frequencies, 1.0


def _llama3_frequencies(rope: RopeSpec, frequencies: np.ndarray) -> np.ndarray:
    f32 = np.float32
    old_length = rope.original_max_position
    # torch divides a Python number by a tensor as reciprocal times number, rounding twice.
    wavelengths = (f32(1) / frequencies) * f32(2 * math.pi)
    longest, shortest = f32(old_length / rope.low_freq_factor), f32(old_length / rope.high_freq_factor)
    scaled = np.where(wavelengths > longest, frequencies / f32(rope.factor), frequencies)
    smooth = (f32(1) / wavelengths) * f32(old_length) - f32(rope.low_freq_factor)
    smooth = smooth / f32(rope.high_freq_factor - rope.low_freq_factor)
    blended = (f32(1) - smooth) * scaled / f32(rope.factor) + smooth * scaled
    medium = (wavelengths >= shortest) & (wavelengths <= longest)
    return np.where(medium, blended, scaled).astype(np.float32)


def _yarn_frequencies(rope: RopeSpec, periods: np.ndarray, head_dim: int) -> np.ndarray:
    f32 = np.float32

    def correction_dim(rotations: float) -> float:
        span = math.log(rope.original_max_position / (rotations * 2 * math.pi))
        return head_dim * span / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - f32(low)) / f32(high - low), f32(0), f32(1))
    keep = f32(1) - ramp
    interpolated = f32(1) / (f32(rope.factor) * periods)
    return (interpolated * (f32(1) - keep) + (f32(1) / periods) * keep).astype(np.float32)


def rope_tables(rope: RopeSpec, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """cos and sin `[B,T,1,H/2]` in float32 at `positions [B,T]`."""
    frequencies, factor = rope_frequencies(rope, head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates dimension pairs (j, j + H/2) of `x [B,T,N,H]` (Hugging Face's half-split layout)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up, in float32 inside; `[...,F]`."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


@jax.custom_vjp
def probe_gradient(output: Array, probe: Array) -> Array:
    """Returns `output`; the probe's gradient is the sum over positions of the squared gradient of `output`.

    Args:
        output: a linear's output `[...,O]`.
        probe: `[O]`, any values; they have no effect.
    """
    return output


def _probe_fwd(output: Array, probe: Array) -> tuple[Array, None]:
    return output, None


def _probe_bwd(_: None, gradient: Array) -> tuple[Array, Array]:
    leading = tuple(range(gradient.ndim - 1))
    return gradient, jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=leading)


probe_gradient.defvjp(_probe_fwd, _probe_bwd)
