"""Perplexity equals the definition on full logits, whatever the batches and the padding."""

import dataclasses
import math
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from efx_jax.compare.paired import Windows, perplexity_ratio
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import InputError
from efx_jax.evaluation import likelihood, scores
from efx_jax.evaluation.perplexity import perplexity, summarise
from efx_jax.lora import init_lora
from efx_jax.model.decoder import forward
from efx_jax.weights.hf import save_pretrained
from tests.tiny import LLAMA, strong_params

SPEC = dataclasses.replace(LLAMA, vocab_size=97, tie_word_embeddings=False, max_position_embeddings=128)
PARAMS = strong_params(SPEC)
# One shape for all sequences: a causal model does not see the padding on the right.
FORWARD = jax.jit(forward, static_argnames="spec")


def windows(*lengths: int) -> list[Tokenized]:
    generator = np.random.default_rng(1)
    return [
        Tokenized(generator.integers(0, SPEC.vocab_size, n).astype(np.int32), generator.random(n) < 0.7)
        for n in lengths
    ]


def by_definition(window: Tokenized, **model) -> tuple[float, int]:
    tokens = np.pad(window.tokens, (0, 40 - len(window.tokens)))[None]
    logits = np.asarray(FORWARD(PARAMS, tokens, SPEC, **model))[0].astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = log_probabilities[np.arange(len(window.tokens) - 1), window.tokens[1:]]
    return float(-picked[window.loss[1:]].sum()), int(window.loss[1:].sum())


def test_perplexity_is_exp_of_the_sum_over_the_tokens() -> None:
    texts = windows(40, 33, 7, 40, 2)
    nll, tokens = zip(*(by_definition(w) for w in texts), strict=True)
    result = perplexity(PARAMS, texts, SPEC, batch_size=2)
    np.testing.assert_allclose(result.window_nll, nll, rtol=1e-5)
    assert (result.window_tokens.tolist(), result.tokens) == (list(tokens), sum(tokens))
    assert result.value == pytest.approx(np.exp(sum(nll) / sum(tokens)), rel=1e-5)
    assert result.interval[0] < result.value < result.interval[1]


def test_a_model_that_overflows_has_no_perplexity() -> None:
    broken = PARAMS | {"norm": np.full(PARAMS["norm"].shape, np.inf, np.float32)}
    with pytest.raises(InputError, match="perplexity is not finite: the model overflows"):
        perplexity(broken, windows(40, 33), SPEC, batch_size=2)


def test_another_text_of_the_same_lengths_has_another_checksum() -> None:
    texts = windows(20, 31)
    other = [dataclasses.replace(texts[0], tokens=texts[0].tokens[::-1].copy()), texts[1]]
    found = [perplexity(PARAMS, each, SPEC, batch_size=2).text for each in (texts, texts, other)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_filling_the_last_batch_changes_nothing(batch_size: int) -> None:
    texts = windows(20, 31, 12, 9, 31)
    reference = perplexity(PARAMS, texts, SPEC, batch_size=5)
    np.testing.assert_allclose(
        perplexity(PARAMS, texts, SPEC, batch_size=batch_size).window_nll, reference.window_nll, rtol=1e-5
    )


def test_chunking_the_head_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = windows(30, 17)
    reference = perplexity(PARAMS, texts, SPEC, batch_size=2).window_nll
    jax.clear_caches()
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", 4 * SPEC.vocab_size * 5)
    np.testing.assert_allclose(perplexity(PARAMS, texts, SPEC, batch_size=2).window_nll, reference, rtol=1e-5)
    jax.clear_caches()


def test_adapters_and_masks_are_measured() -> None:
    adapters = init_lora(jax.random.key(1), PARAMS, SPEC, rank=2)
    adapters = adapters.replace(lora_b=jax.tree.map(lambda b: b + 0.3, adapters.lora_b))
    masks = {"up_proj": jax.random.bernoulli(jax.random.key(2), 0.5, PARAMS["layers"]["up_proj"].shape)}
    texts = windows(25)
    nll, _ = by_definition(texts[0], adapters=adapters, masks=masks)
    plain, _ = by_definition(texts[0])
    assert abs(nll - plain) > 0.1
    assert perplexity(PARAMS, texts, SPEC, adapters, masks).nll_sum == pytest.approx(nll, rel=1e-5)


def test_bfloat16_operands_stay_close() -> None:
    texts = windows(40, 40)
    exact = perplexity(PARAMS, texts, SPEC)
    assert perplexity(PARAMS, texts, SPEC, compute_dtype="bfloat16").nll_sum == pytest.approx(exact.nll_sum, rel=0.02)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    params = {**PARAMS, "lm_head": np.zeros((SPEC.vocab_size, SPEC.hidden_size), np.float32)}
    assert perplexity(params, windows(40), SPEC).value == pytest.approx(SPEC.vocab_size, rel=1e-5)


def test_the_interval_resamples_windows() -> None:
    generator = np.random.default_rng(0)
    tokens = np.full(200, 50)
    nll = 50 * generator.normal(2.0, 0.5, 200)
    result = summarise(nll, tokens)
    expected = 1.96 * 0.5 / np.sqrt(200)
    low, high = np.log(result.interval)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    assert summarise(nll, tokens).interval == result.interval


def test_resamples_of_many_windows_are_never_all_held(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    nll, tokens = generator.normal(100, 9, 1000), generator.integers(1, 60, 1000)
    whole = summarise(nll, tokens), perplexity_ratio({0: Windows(nll, tokens)}, {0: Windows(nll[::-1], tokens)})
    monkeypatch.setattr(scores, "_BLOCK", 20_000)
    tracemalloc.start()
    blocks = summarise(nll, tokens), perplexity_ratio({0: Windows(nll, tokens)}, {0: Windows(nll[::-1], tokens)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # of 16 MB
    assert blocks[0].interval == pytest.approx(whole[0].interval, rel=1e-12)
    assert blocks[1][1] == pytest.approx(whole[1][1], rel=1e-12)


def test_a_single_window_has_no_interval() -> None:
    assert summarise(np.asarray([90.0]), np.asarray([50])).interval is None
    assert summarise(np.asarray([90.0, 0.0]), np.asarray([50, 0])).interval is None


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(InputError, match="at least one token"):
        perplexity(PARAMS, [Tokenized(np.zeros(4, np.int32), np.zeros(4, bool))], SPEC)


def test_it_is_that_of_transformers_on_the_same_windows(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_pretrained(tmp_path / "model", PARAMS, SPEC)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    texts = [Tokenized(window.tokens, np.arange(len(window.tokens)) > 0) for window in windows(40, 40, 17)]
    total = 0.0
    for text in texts:
        ids = torch.tensor(text.tokens, dtype=torch.long)[None]
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (len(text.tokens) - 1)
    found = perplexity(PARAMS, texts, SPEC, batch_size=2)
    assert found.value == pytest.approx(math.exp(total / found.tokens), rel=1e-4)
