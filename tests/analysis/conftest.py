"""Tiny models with random weights and adapters on a padded batch, shared so that every shape is compiled once."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.analysis.blocks import BlockView, Model, look_at, walk
from efx_jax.lora import Adapters
from efx_jax.model.spec import LINEARS, ModelSpec, param_shapes, spec_from_config
from tests.quick import quick_compilation

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model on a batch, what it was made of, and its second block."""

    params: Tree
    adapters: Adapters
    batch: dict[str, np.ndarray]
    model: Model
    view: BlockView

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def tiny_model(model_type: str, heads: int, kv_heads: int) -> Tiny:
    """D 16, F 24, H 4, L 2, V 31, rank 3, scale 2; five rows of at most 12 tokens."""
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
    rng = np.random.default_rng(5)

    def draw(name: str, shape: tuple[int, ...]) -> jnp.ndarray:
        if "norm" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
        return jnp.asarray(rng.standard_normal(shape) * (1.5 / np.sqrt(shape[-1])), jnp.float32)

    shapes = param_shapes(spec)
    layers = {name: draw(name, shape) for name, shape in shapes["layers"].items()}
    params = {name: draw(name, shape) for name, shape in shapes.items() if name != "layers"} | {"layers": layers}
    dims = {name: layers[name].shape for name in LINEARS}
    lora_a = {name: rng.standard_normal((count, 3, width)) / np.sqrt(width) for name, (count, _, width) in dims.items()}
    lora_b = {name: 0.2 * rng.standard_normal((count, units, 3)) for name, (count, units, _) in dims.items()}
    as_floats = functools.partial(jnp.asarray, dtype=jnp.float32)
    adapters = Adapters(jax.tree.map(as_floats, lora_a), jax.tree.map(as_floats, lora_b), scale=2.0)
    tokens = rng.integers(0, 31, (5, 12)).astype(np.int32)
    batch = {"tokens": tokens, "lengths": np.asarray([12, 12, 9, 7, 4], np.int32)}
    with quick_compilation():
        model = look_at(params, adapters, batch, spec)
        ((_, view),) = walk(model, [1])
    return Tiny(params, adapters, batch, model, view)


@pytest.fixture(scope="session")
def llama() -> Tiny:
    """Grouped queries: four query heads on two key/value heads."""
    return tiny_model("llama", 4, 2)


@pytest.fixture(scope="session")
def qwen3() -> Tiny:
    """Query and key norms; four query heads on one key/value head."""
    return tiny_model("qwen3", 4, 1)


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.getfixturevalue(request.param)
