"""Tiny models with random weights, shared so that every shape is compiled once."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.lora import Adapters
from efx_jax.model.spec import LINEARS, ModelSpec, param_shapes, spec_from_config
from efx_jax.pruning.statistics import Statistics, collect_statistics

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model, adapters with a B that matters, and two right-padded calibration batches."""

    spec: ModelSpec
    params: Tree
    adapters: Adapters
    batches: list[dict[str, np.ndarray]]


def tiny_model(model_type: str, heads: int, kv_heads: int) -> Tiny:
    """D 16, F 24, H 4, L 2, V 31, rank 3, scale 2."""
    spec = spec_from_config(
        {
            "model_type": model_type,
            "vocab_size": 31,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 4,
            "rms_norm_eps": 1e-5,
        }
    )
    rng = np.random.default_rng(3)

    def draw(name: str, shape: tuple[int, ...]) -> jnp.ndarray:
        if "norm" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
        return jnp.asarray(rng.standard_normal(shape) * (1.5 / np.sqrt(shape[-1])), jnp.float32)

    shapes = param_shapes(spec)
    layers = {name: draw(name, shape) for name, shape in shapes["layers"].items()}
    params = {name: draw(name, shape) for name, shape in shapes.items() if name != "layers"} | {"layers": layers}
    dims = {name: layers[name].shape for name in LINEARS}
    adapters = Adapters(
        lora_a={
            n: jnp.asarray(rng.standard_normal((c, 3, i)) / np.sqrt(i), jnp.float32) for n, (c, _, i) in dims.items()
        },
        lora_b={n: jnp.asarray(0.2 * rng.standard_normal((c, o, 3)), jnp.float32) for n, (c, o, _) in dims.items()},
        scale=2.0,
    )
    tokens, lengths = rng.integers(0, 31, (2, 8, 16)).astype(np.int32), rng.integers(6, 17, (2, 8)).astype(np.int32)
    batches = [{"tokens": t, "lengths": n} for t, n in zip(tokens, lengths, strict=True)]
    return Tiny(spec, params, adapters, batches)


@pytest.fixture(scope="session")
def llama() -> Tiny:
    """Grouped queries: four query heads on two key/value heads."""
    return tiny_model("llama", 4, 2)


@pytest.fixture(scope="session")
def qwen3() -> Tiny:
    """Query and key norms; four query heads on one key/value head."""
    return tiny_model("qwen3", 4, 1)


@pytest.fixture(scope="session")
def stats(llama: Tiny) -> Statistics:
    """What the linears of `llama` see of its batches, with Grams."""
    return collect_statistics(llama.params, llama.batches, llama.spec, llama.adapters, gram=True)
