"""Tiny models with random weights and adapters on a padded batch, shared so that every shape is compiled once."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from efx_jax.analysis.blocks import BlockView, Model, look_at, walk
from efx_jax.lora import Adapters
from efx_jax.model.spec import ModelSpec
from tests.quick import quick_compilation
from tests.tiny import random_model

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
    rng = np.random.default_rng(5)
    spec, params, adapters = random_model(rng, model_type, heads, kv_heads)
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
