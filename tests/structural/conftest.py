"""Tiny models with random weights and biases, random masks of units, and what they mean spelled out row by row."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.lora import Adapters
from efx_jax.model.spec import LINEARS, ModelSpec, param_shapes, spec_from_config
from efx_jax.structural.units import Space, units_of
from tests.quick import quick_compilation

Tree = dict[str, Any]
CASES = {
    "llama": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama-mha-tied": {"model_type": "llama", "num_attention_heads": 4, "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "num_attention_heads": 4, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 3},
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
}
SPACES: tuple[Space, ...] = ("paper", "sliceable")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model and adapters with a B that matters."""

    spec: ModelSpec
    params: Tree
    adapters: Adapters
    tokens: np.ndarray


@pytest.fixture(scope="session")
def make_tiny() -> Callable[[str], Tiny]:
    """`make_tiny(case)`: D 24, F 12, H 4, L 3, V 31, rank 3, scale 2."""

    def make(case: str) -> Tiny:
        sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 12, "num_hidden_layers": 3, "head_dim": 4}
        spec = spec_from_config({**sizes, "rms_norm_eps": 1e-5, **CASES[case]})
        rng = np.random.default_rng(3)

        def draw(name: str, shape: tuple[int, ...]) -> jnp.ndarray:
            if "norm" in name:
                return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
            return jnp.asarray(rng.standard_normal(shape) * (1.5 / np.sqrt(shape[-1])), jnp.float32)

        shapes = param_shapes(spec)
        params = {name: draw(name, shape) for name, shape in shapes.items() if name != "layers"}
        params["layers"] = {name: draw(name, shape) for name, shape in shapes["layers"].items()}
        dims = {name: params["layers"][name].shape for name in LINEARS}
        adapters = Adapters(
            lora_a={n: draw(n, (count, 3, i)) for n, (count, _, i) in dims.items()},
            lora_b={n: 0.3 * draw(n, (count, o, 3)) for n, (count, o, _) in dims.items()},
            scale=2.0,
        )
        return Tiny(spec, params, adapters, rng.integers(0, 31, (2, 9)).astype(np.int32))

    return make


@pytest.fixture(scope="session")
def draw_masks() -> Callable[..., dict[str, np.ndarray]]:
    """`draw_masks(spec, space, share)`: random masks in which layers keep different numbers of units."""

    def draw(spec: ModelSpec, space: Space, share: float = 0.6, seed: int = 5) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        masks = {
            kind: rng.uniform(size=(spec.num_layers, units.count)) < share
            for kind, units in units_of(spec, space).items()
        }
        masks["hidden"][1, :5] = False
        return masks

    return draw


@pytest.fixture(scope="session")
def zero_by_hand() -> Callable[..., Tree]:
    """`zero_by_hand(params, unit_masks, spec)`: the pruned rows, columns and biases at 0, written out in loops."""

    def zero(params: Tree, unit_masks: dict[str, np.ndarray], spec: ModelSpec) -> Tree:
        layers = {name: np.array(leaf) for name, leaf in params["layers"].items()}
        width, group = spec.head_dim, spec.num_heads // spec.num_kv_heads

        def drop_row(name: str, layer: int, row: int) -> None:
            layers[name][layer, row] = 0
            if f"{name}_bias" in layers:
                layers[f"{name}_bias"][layer, row] = 0

        for layer in range(spec.num_layers):
            for unit in np.flatnonzero(~unit_masks["hidden"][layer]):
                drop_row("gate_proj", layer, unit)
                drop_row("up_proj", layer, unit)
                layers["down_proj"][layer, :, unit] = 0
            for head in range(spec.num_heads):
                shared = head // group
                for dim in range(width):
                    query, key = head * width + dim, shared * width + dim
                    if "heads" in unit_masks:
                        q_gone = v_gone = not unit_masks["heads"][layer, shared]
                    else:
                        q_gone = not unit_masks["key_dims"][layer, dim % (width // 2)]
                        v_gone = not unit_masks["value_dims"][layer, dim]
                    if q_gone:
                        drop_row("q_proj", layer, query)
                        drop_row("k_proj", layer, key)
                    if v_gone:
                        drop_row("v_proj", layer, key)
                        layers["o_proj"][layer, :, query] = 0
        return {**params, "layers": {name: jnp.asarray(leaf) for name, leaf in layers.items()}}

    return zero
