"""Perplexity, scored answers and generated ones on meshes of simulated devices, against one device."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import MeshConfig
from efx_jax.data.prompts import Example
from efx_jax.data.tokens import Tokenized
from efx_jax.evaluation import generation, tasks
from efx_jax.evaluation import perplexity as measured
from efx_jax.evaluation.generation import generate_texts
from efx_jax.evaluation.perplexity import perplexity
from efx_jax.evaluation.tasks import label_scores
from efx_jax.model.generate import generate
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import BATCH, axes_size, tree_shardings
from efx_jax.weights.hf import load_tokenizer
from tests.tiny import EVEN, save_tokenizer, strong_params

SPEC = dataclasses.replace(EVEN, vocab_size=64, tie_word_embeddings=False)
MESHES = [(2, 2, 2), (8, 1, 1), (1, 1, 4)]
WORDS = ["fever", "cough", "rash", "joint", "pain", "heart", "lung", "skin", "blood"]
LABELS = (" yes", " no", " old new")


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return strong_params(SPEC)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(folder)


def texts() -> list[Tokenized]:
    rng = np.random.default_rng(1)
    sizes = (20, 31, 12, 9, 31)
    return [Tokenized(rng.integers(0, SPEC.vocab_size, n).astype(np.int32), rng.random(n) < 0.7) for n in sizes]


def rows(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(" ".join(rng.choice(WORDS, length)), " yes", f"test row {length}") for length in lengths]


@pytest.mark.parametrize("shape", MESHES)
def test_what_is_measured_on_a_mesh_is_what_one_device_measures(
    params: dict[str, Any], tokenizer: Any, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every pass has as many rows as the devices divide: otherwise each of them computes all of the rows."""
    examples = rows(9, 2, 15, 1, 5)

    def measure(params: dict[str, Any]) -> tuple[Any, ...]:
        scores = label_scores(params, SPEC, tokenizer, examples, LABELS, batch_size=3)
        [written] = generate_texts(params, SPEC, tokenizer, examples, 4, batch_size=3)
        return perplexity(params, texts(), SPEC, batch_size=3).window_nll, scores, written

    nll, scores, written = measure(params)
    mesh = make_mesh(MeshConfig(*shape))
    seen: list[int] = []
    for module, name in ((measured, "_batch_nll"), (tasks, "tree_scores")):
        monkeypatch.setattr(module, name, _noting(seen, getattr(module, name)))
    monkeypatch.setattr(generation, "generate", _noting(seen, generate))
    with jax.set_mesh(mesh):
        found = measure(jax.device_put(params, tree_shardings(mesh, params)))
    np.testing.assert_allclose(found[0], nll, rtol=1e-5)
    np.testing.assert_allclose(found[1], scores, atol=1e-4)
    assert found[2] == written
    assert len(seen) >= 3 and all(count % axes_size(BATCH, mesh.shape) == 0 for count in seen)


def _noting(seen: list[int], function: Any) -> Any:
    """`function`, whose second argument is a batch or its tokens, noting the rows of that."""

    def call(params: Any, batch: Any, *others: Any, **named: Any) -> Any:
        seen.append(len(batch["tokens"] if isinstance(batch, dict) else batch))
        return function(params, batch, *others, **named)

    return call


def test_no_device_holds_the_cache_of_rows_of_others(params: dict[str, Any]) -> None:
    """Long answers end at different times, but the unfinished rows stay where they are."""
    mesh, count, new = make_mesh(MeshConfig(2, 2, 1)), 32, 128
    tokens, lengths = np.ones((count, 8), np.int32), np.full(count, 8, np.int32)
    cache = SPEC.num_layers * count * SPEC.num_kv_heads * SPEC.head_dim * (8 + new)

    def largest(mesh: Any) -> int:
        placed = jax.device_put(params, tree_shardings(mesh, params))
        with jax.set_mesh(mesh):
            hlo = generate.lower(placed, tokens, lengths, SPEC, new, stop_tokens=(7,)).compile().as_text()
        return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"[a-z]+\d+\[([\d,]+)\]", hlo))

    assert largest(make_mesh(MeshConfig(1, 1, 1))) == cache
    assert largest(mesh) == cache // 4


def test_on_one_device_and_with_split_heads_finished_rows_leave_the_batch(params: dict[str, Any]) -> None:
    tokens, lengths = jnp.ones((32, 8), jnp.int32), jnp.full(32, 8)
    for shape, loops in (((1, 1, 1), 3), ((1, 1, 2), 3), ((2, 1, 1), 1)):
        mesh = make_mesh(MeshConfig(*shape))
        with jax.set_mesh(mesh):
            traced = str(jax.make_jaxpr(lambda *given: generate(*given, SPEC, 128))(params, tokens, lengths))
        assert len(re.findall(r"= while\[", traced)) == loops
