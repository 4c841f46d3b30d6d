"""Models of published shapes with random weights, created on the device and leaving nothing else there."""

import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from efx_jax.errors import InputError
from efx_jax.lora import Adapters, init_lora
from efx_jax.masks import packed_shape
from efx_jax.model.spec import LINEARS, ModelSpec, param_shapes
from efx_jax.weights.config_json import read_json
from efx_jax.weights.shapes import known_shapes

RANK, ALPHA = 8, 16
MODELS = ("llama-2-7b", "llama-3.1-8b", "qwen3-8b")


def shape_config(model: str) -> dict[str, Any]:
    """The `config.json` of a name in `configs/shapes/`, or of a folder.

    Raises:
        InputError: neither.
    """
    shapes = known_shapes()
    if model in shapes:
        return shapes[model]
    file = Path(model) / "config.json"
    if file.is_file():
        return read_json(file)
    raise InputError(f"{model}: expected a folder with config.json or one of {', '.join(shapes)}")


def random_params(key: jax.Array, spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """As `init_params`, but one layer at a time, so that the largest array of 32-bit draws is one layer's."""
    leaves, tree = jax.tree.flatten(param_shapes(spec), is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(key, len(leaves))
    drawn = [_draw(leaf_key, shape, dtype) for leaf_key, shape in zip(keys, leaves, strict=True)]
    params: dict[str, Any] = jax.tree.unflatten(tree, drawn)
    norms = {name: jnp.ones_like(leaf) for name, leaf in params["layers"].items() if "norm" in name}
    return {**params, "norm": jnp.ones_like(params["norm"]), "layers": {**params["layers"], **norms}}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    def one(layer_key: jax.Array) -> jax.Array:
        return (0.02 * jax.random.normal(layer_key, shape[1:], jnp.float32)).astype(dtype)

    return jax.lax.map(one, jax.random.split(key, shape[0]), batch_size=None if len(shape) == 3 else 1024)


def random_masks(key: jax.Array, spec: ModelSpec) -> dict[str, jax.Array]:
    """Packed random masks for every linear: each entry is kept with probability one half."""
    layers = param_shapes(spec)["layers"]
    keys = zip(LINEARS, jax.random.split(key, len(LINEARS)), strict=True)
    return {name: jax.random.bits(leaf_key, packed_shape(layers[name]), jnp.uint8) for name, leaf_key in keys}


def random_adapters(key: jax.Array, params: dict[str, Any], spec: ModelSpec) -> Adapters:
    """Adapters for every linear, as training starts with them."""
    return init_lora(key, params, spec, RANK, ALPHA)


def matmul_rate(tokens: int, spec: ModelSpec, repeats: int) -> float:
    """FLOP/s of the largest matmul of the model, `[T,D] x [F,D]` in bfloat16 with float32 sums."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (tokens, spec.hidden_size), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (spec.intermediate_size, spec.hidden_size), jnp.bfloat16)

    @jax.jit
    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("ti,oi->to", x, weight, preferred_element_type=jnp.float32).astype(x.dtype)

    jax.block_until_ready(product(x, weight))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        # Several are in flight at once, so that launch costs hide behind the one before.
        jax.block_until_ready([product(x, weight) for _ in range(3)])
        seconds.append((time.perf_counter() - began) / 3)
    return 2 * tokens * spec.hidden_size * spec.intermediate_size / statistics.median(seconds)


def peak_memory() -> int | None:
    """The most bytes that this process has held on its device; None where the device does not report it (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
