"""Texts are what the model writes to each prompt by itself, in the order of the rows."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.data.prompts import Example
from efx_jax.errors import InputError
from efx_jax.evaluation import generation
from efx_jax.evaluation.generation import end_tokens, generate_texts
from efx_jax.lora import init_lora, merge
from efx_jax.model.generate import generate
from efx_jax.model.sampling import Sampling
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.weights.hf import load_pretrained, load_tokenizer

WORDS = ["fever", "cough", "rash", "joint", "pain", "heart", "lung", "skin", "blood"]
NEW = 5


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> tuple[Any, ModelSpec, Any]:
    params, spec = load_pretrained(tiny_folder)
    # Larger matrices, so that texts differ.
    params = jax.tree.map(lambda x: x * (15 if x.ndim > 1 else 1), params)
    return params, spec, load_tokenizer(tiny_folder)


def examples(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(" ".join(rng.choice(WORDS, length)), " yes", f"test row {length}") for length in lengths]


def alone(model: Any, row: Example, **how: Any) -> str:
    params, spec, tokenizer = model
    ids = tokenizer(row.prompt)["input_ids"]
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(ids)] = ids
    stops = tuple(sorted(end_tokens(tokenizer, spec)))
    found = np.asarray(generate(params, tokens, np.asarray([len(ids)]), spec, NEW, stop_tokens=stops, **how))[0]
    return tokenizer.decode([token for token in found if token >= 0 and token not in stops], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_texts_come_in_the_order_of_the_rows(model: Any, batch_size: int) -> None:
    params, spec, tokenizer = model
    rows = examples(9, 2, 20, 1, 5)
    [texts] = generate_texts(params, spec, tokenizer, rows, NEW, batch_size=batch_size)
    assert texts == [alone(model, row) for row in rows]
    assert len(set(texts)) == 5 and not any(token in "".join(texts) for token in ("<s>", "</s>"))


def test_what_is_sampled_does_not_depend_on_the_batch(model: Any) -> None:
    params, spec, tokenizer = model
    rows, way = examples(9, 2, 20, 1, 5), Sampling(0.9, 20, 0.9)
    [once] = generate_texts(params, spec, tokenizer, rows, NEW, batch_size=2, sampling=way, seeds=(3,))
    both = generate_texts(params, spec, tokenizer, rows, NEW, batch_size=8, sampling=way, seeds=(4, 3))
    assert once == both[1]
    assert sum(a == b for a, b in zip(*both, strict=True)) < 3


def test_adapters_and_masks_write(model: Any) -> None:
    params, spec, tokenizer = model
    adapters = init_lora(jax.random.key(2), params, spec, rank=2)
    adapters = adapters.replace(lora_b=jax.tree.map(lambda b: b + 0.3, adapters.lora_b))
    masks = {name: jnp.abs(params["layers"][name]) > 0.1 for name in LINEARS}
    rows = examples(9, 2)
    [texts] = generate_texts(params, spec, tokenizer, rows, NEW, adapters, masks)
    assert [texts] == generate_texts(merge(params, adapters, masks), spec, tokenizer, rows, NEW)
    assert [texts] != generate_texts(params, spec, tokenizer, rows, NEW)


def test_an_answer_ends_before_an_end_of_sequence(model: Any) -> None:
    params, spec, tokenizer = model
    rows = examples(9, 2, 5)
    whole = [text.split() for text in generate_texts(params, spec, tokenizer, rows, NEW)[0]]
    stop = whole[0][2]
    ending = dataclasses.replace(spec, eos_token_ids=tuple(tokenizer.convert_tokens_to_ids([stop])))
    [texts] = generate_texts(params, ending, tokenizer, rows, NEW)
    cut = [words[: words.index(stop)] if stop in words else words for words in whole]
    assert [text.split() for text in texts] == cut and cut != whole


def test_every_end_of_sequence_of_model_and_tokenizer_counts(model: Any) -> None:
    _, spec, tokenizer = model
    assert end_tokens(tokenizer, spec) == {tokenizer.eos_token_id}
    assert end_tokens(tokenizer, dataclasses.replace(spec, eos_token_ids=(7, 9))) == {7, 9, tokenizer.eos_token_id}


def test_a_prompt_that_leaves_no_room_is_refused(model: Any) -> None:
    params, spec, tokenizer = model
    rows = examples(3, 60)
    with pytest.raises(
        InputError, match="test row 60: the prompt has 60 tokens; expected 1 to 59, the model's context"
    ):
        generate_texts(params, spec, tokenizer, rows, NEW)
    assert len(generate_texts(params, spec, tokenizer, rows, NEW - 1)[0]) == 2
    assert generate_texts(params, spec, tokenizer, [], NEW) == [[]]


def test_prompts_of_a_bucket_compile_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, spec, tokenizer = model
    static = ("spec", "max_new_tokens", "stop_tokens", "compute_dtype", "sampling", "padding")
    counted = jax.jit(chex.assert_max_traces(generate.__wrapped__, n=2), static_argnames=static)
    monkeypatch.setattr(generation, "generate", counted)
    rows = examples(*range(1, 58, 7))  # up to 32 and up to 64 tokens
    generate_texts(params, spec, tokenizer, rows, 2, batch_size=2)


@pytest.mark.slow
def test_smollm2_writes_the_tokens_of_transformers(tmp_path: Path) -> None:
    """64 prompts of 7 to 111 tokens, 64 new tokens each, float32; only where two logits tie may another be chosen."""
    path = os.environ.get("EFX_SMOLLM2_GGUF", "")
    if not Path(path).is_file():
        pytest.skip("EFX_SMOLLM2_GGUF does not name a file")
    pytest.importorskip("torch")
    root = Path(__file__).parents[2]
    flags = ("--model", path, "--only", "parity", "--out", str(tmp_path / "rows.json"))
    command = [sys.executable, str(root / "benchmarks" / "evaluation.py"), *flags]
    subprocess.run(command, check=True, timeout=1200, env={**os.environ, "PYTHONPATH": str(root)})
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["prompts"], row["new_tokens"], row["other_than_a_tie"]) == (64, 64, 0)
    assert row["value"] > 0.9
