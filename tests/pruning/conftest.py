"""Tiny models with random weights, shared so that every shape is compiled once."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from efx_jax.lora import Adapters
from efx_jax.model.spec import ModelSpec
from efx_jax.pruning.statistics import Statistics, collect_statistics
from tests.quick import quick_compilation
from tests.tiny import random_model

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model, adapters with a B that matters, and two right-padded calibration batches."""

    spec: ModelSpec
    params: Tree
    adapters: Adapters
    batches: list[dict[str, np.ndarray]]


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whole events have the most programs to compile; what they are made of is tested as users compile it."""
    with quick_compilation() if "event" in request.path.name else contextlib.nullcontext():
        yield


def tiny_model(model_type: str, heads: int, kv_heads: int) -> Tiny:
    """D 16, F 24, H 4, L 2, V 31, rank 3, scale 2."""
    rng = np.random.default_rng(3)
    spec, params, adapters = random_model(rng, model_type, heads, kv_heads)
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
