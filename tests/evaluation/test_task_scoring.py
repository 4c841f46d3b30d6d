"""Scoring all answers behind one prompt equals scoring every prompt + answer sequence by itself."""

import dataclasses

import jax
import numpy as np
import pytest

from efx_jax.data.prompts import Example
from efx_jax.data.tokenizer import encode_prompts
from efx_jax.errors import InputError
from efx_jax.evaluation.branches import encode_labels, group_rows, grow_tree
from efx_jax.evaluation.results import summarise
from efx_jax.evaluation.tasks import label_scores
from efx_jax.lora import init_lora
from efx_jax.model.decoder import forward
from tests.tiny import LLAMA, strong_params

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SPEC = dataclasses.replace(
    LLAMA, model_type="qwen3", vocab_size=64, head_dim=8, max_position_embeddings=96, qk_norm=True
)
PARAMS = strong_params(SPEC)
# One shape for all sequences: a causal model does not see the padding on the right.
FORWARD = jax.jit(forward, static_argnames="spec")
WORDS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(61))]
LABELS = (" w1", " w2 w3 w4", " w2 w5", " w6")


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    bare.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


def examples(*lengths: int) -> list[Example]:
    generator = np.random.default_rng(3)
    return [
        Example(" ".join(f"w{i}" for i in generator.integers(0, 61, n)), LABELS[row % len(LABELS)])
        for row, n in enumerate(lengths)
    ]


def scored_apart(example: Example, label: str, tokenizer, **model) -> list[float]:
    prompt = tokenizer(example.prompt)["input_ids"]
    answer = tokenizer(label, add_special_tokens=False)["input_ids"]
    tokens = np.zeros((1, SPEC.max_position_embeddings), np.int32)
    inputs = prompt + answer[:-1]
    tokens[0, : len(inputs)] = inputs
    logits = FORWARD(PARAMS, tokens, SPEC, **model)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))[0]
    return [float(log_probabilities[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_shared_prompt_scores_equal_separate_scores(tokenizer, batch_size: int) -> None:
    rows = examples(5, 40, 1, 12, 23, 7, 40)
    scores = label_scores(PARAMS, SPEC, tokenizer, rows, LABELS, batch_size=batch_size)
    expected = [[sum(scored_apart(row, label, tokenizer)) for label in LABELS] for row in rows]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    means = label_scores(PARAMS, SPEC, tokenizer, rows, LABELS, batch_size=batch_size, normalize="mean")
    expected = [[np.mean(scored_apart(row, label, tokenizer)) for label in LABELS] for row in rows]
    np.testing.assert_allclose(means, expected, atol=1e-4)


def test_adapters_and_masks_are_scored(tokenizer) -> None:
    adapters = init_lora(jax.random.key(1), PARAMS, SPEC, rank=2)
    adapters = adapters.replace(lora_b=jax.tree.map(lambda b: b + 0.3, adapters.lora_b))
    masks = {"down_proj": jax.random.bernoulli(jax.random.key(2), 0.5, PARAMS["layers"]["down_proj"].shape)}
    (row,) = examples(9)
    scores = label_scores(PARAMS, SPEC, tokenizer, [row], LABELS, adapters, masks)
    expected = [sum(scored_apart(row, label, tokenizer, adapters=adapters, masks=masks)) for label in LABELS]
    np.testing.assert_allclose(scores[0], expected, atol=1e-4)
    assert np.abs(scores - label_scores(PARAMS, SPEC, tokenizer, [row], LABELS)).max() > 0.1


def contracts() -> list[Example]:
    """Two documents with five hypotheses each, two of which begin alike, a short row and one that comes twice."""
    rng = np.random.default_rng(4)
    documents = [" ".join(f"w{i}" for i in rng.integers(0, 61, size)) for size in (40, 33)]
    endings = [" w7", " w8 w9 w10", " w8 w9 w11 w12", " w8", " w13 w14"]
    rows = [Example(document + ending, " w1") for ending in endings for document in documents]
    return [*rows, Example("w3 w4", " w6"), rows[0]]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_rows_that_share_a_document_score_as_they_do_alone(tokenizer, batch_size: int) -> None:
    rows = contracts()
    scores = label_scores(PARAMS, SPEC, tokenizer, rows, LABELS, batch_size=batch_size)
    alone = np.concatenate([label_scores(PARAMS, SPEC, tokenizer, [row], LABELS) for row in rows])
    np.testing.assert_allclose(scores, alone, rtol=1e-5, atol=1e-5)
    expected = [sum(scored_apart(rows[4], label, tokenizer)) for label in LABELS]
    np.testing.assert_allclose(scores[4], expected, atol=1e-4)


def test_a_shared_document_is_computed_once(tokenizer) -> None:
    prompts = encode_prompts([row.prompt for row in contracts()], tokenizer)
    answers = encode_labels(LABELS, tokenizer)
    groups = group_rows(prompts, sum(len(ids) - 1 for ids in answers))
    assert sorted(map(sorted, groups)) == [[0, 2, 4, 6, 8, 11], [1, 3, 5, 7, 9], [10]]
    (first,) = [grow_tree(rows, prompts, answers) for rows in groups if 0 in rows]
    # BOS and the document, the hypotheses as a tree of their own, w2 w3 and w2 behind each of them.
    assert len(first.tokens) == 1 + 40 + (1 + 5 + 2) + 2 * 5
    assert len(first.targets) == 6 * sum(map(len, answers))


def test_in_a_tree_every_token_sees_its_own_sequence(tokenizer) -> None:
    prompts = encode_prompts([row.prompt for row in contracts()], tokenizer)
    answers = encode_labels(LABELS, tokenizer)
    tree = grow_tree([0, 2, 4, 6, 8, 11], prompts, answers)
    wanted = {tuple(prompts[row] + ids[:i]) for row in tree.rows for ids in answers for i in range(len(ids))}
    for source, target, row, answer in zip(tree.sources, tree.targets, tree.rows, tree.answers, strict=True):
        place = tree.places[source]
        seen = [key for key in range(place + 1) if tree.ends[key] > place]
        np.testing.assert_array_equal(tree.positions[seen], np.arange(len(seen)))
        behind = tree.tokens[seen].tolist()
        assert behind[: len(prompts[row])] == prompts[row]
        assert answers[answer][len(behind) - len(prompts[row])] == target
        wanted.discard(tuple(behind))
    assert not wanted


def test_a_tree_has_at_most_twice_the_tokens_of_a_prompt() -> None:
    document = list(range(400))
    prompts = [[*document, *range(first, first + 30)] for first in range(500, 890, 10)]
    groups = group_rows(prompts, answer_tokens=3)
    sizes = [len(grow_tree(rows, prompts, [[1, 2], [3, 4, 5]]).tokens) for rows in groups]
    assert len(groups) == 3 and max(sizes) <= 2 * 430
    assert sorted(row for rows in groups for row in rows) == list(range(39))
    assert group_rows([[1, 2, 3], [1, 2, 4], [5]], 0) == [[0], [1], [2]]
    assert group_rows([], 0) == []


def test_one_token_answers_need_no_branches(tokenizer) -> None:
    rows = examples(5, 11)
    labels = (" w1", " w2")
    (tree,) = [grow_tree([0], [[4, 5]], encode_labels(labels, tokenizer))]
    assert (tree.tokens.tolist(), tree.places.tolist(), tree.sources.tolist()) == ([4, 5], [1], [0, 0])
    expected = [[sum(scored_apart(row, label, tokenizer)) for label in labels] for row in rows]
    np.testing.assert_allclose(label_scores(PARAMS, SPEC, tokenizer, rows, labels), expected, atol=1e-4)


def test_an_answer_that_begins_another_is_closed_by_eos(tokenizer) -> None:
    assert encode_labels((" w1", " w1 w2"), tokenizer) == [[4, 1], [4, 5, 1]]
    assert encode_labels((" w1", " w2 w1"), tokenizer) == [[4], [5, 4]]
    assert encode_labels((" w1", " w1 w2"), tokenizer, "w9") == [[4, 12], [4, 5, 12]]
    tokenizer.eos_token = None
    assert encode_labels((" w1", " w1 w2"), tokenizer, "w9") == [[4, 12], [4, 5, 12]]
    assert encode_labels((" w1", " w2 w1"), tokenizer) == [[4], [5, 4]]
    with pytest.raises(InputError, match="one begins with another, and the tokenizer has no token that ends an answer"):
        encode_labels((" w1", " w1 w2"), tokenizer)


def test_in_a_chat_that_is_the_end_of_a_turn(tokenizer) -> None:
    labels = (" w1", " w1 w2")
    rows = [dataclasses.replace(row, end="w9") for row in examples(5, 11)]
    expected = [[sum(scored_apart(row, f"{label} w9", tokenizer)) for label in labels] for row in rows]
    np.testing.assert_allclose(label_scores(PARAMS, SPEC, tokenizer, rows, labels), expected, atol=1e-4)


def test_answers_need_tokens_of_their_own(tokenizer) -> None:
    with pytest.raises(InputError, match="another answer"):
        encode_labels((" w1", "w1"), tokenizer)
    with pytest.raises(InputError, match="no tokens"):
        encode_labels((" w1", " "), tokenizer)


def test_the_context_holds_prompt_and_longest_answer(tokenizer) -> None:
    row = Example(examples(93)[0].prompt, " w1", "test.jsonl row 7")
    assert len(tokenizer(row.prompt)["input_ids"]) == SPEC.max_position_embeddings - 2
    np.testing.assert_allclose(
        label_scores(PARAMS, SPEC, tokenizer, [row], LABELS)[0],
        [sum(scored_apart(row, label, tokenizer)) for label in LABELS],
        atol=1e-4,
    )
    longer = Example(row.prompt + " w1", " w1", "test.jsonl row 7")
    with pytest.raises(InputError, match=r"test.jsonl row 7: the prompt has 95 tokens; expected 1 to 94"):
        label_scores(PARAMS, SPEC, tokenizer, [longer], LABELS)


def test_few_shapes_compile(tokenizer) -> None:
    chex = pytest.importorskip("chex")
    from efx_jax.evaluation import branches

    jax.clear_caches()
    chex.clear_trace_counter()
    counted = jax.jit(
        chex.assert_max_traces(branches.tree_scores.__wrapped__, n=2), static_argnames=("spec", "compute_dtype")
    )
    rows = examples(*range(1, 50, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efx_jax.evaluation.tasks.tree_scores", counted)
        label_scores(PARAMS, SPEC, tokenizer, rows, LABELS, batch_size=4)


def test_the_summary_counts_and_compares_with_the_best_constant() -> None:
    labels = (" yes", " no", " maybe")
    rows = [Example("p", " yes")] * 5 + [Example("p", " no")] * 3
    result = summarise(np.asarray([0, 0, 0, 1, 2, 1, 1, 0]), rows, labels)
    assert (result["rows"], result["accuracy"], result["unparseable"]) == (8, 5 / 8, 0.0)
    f1 = np.mean([2 * 3 / (4 + 5), 2 * 2 / (3 + 3), 0.0])
    assert result["macro_f1"] == pytest.approx(f1)
    assert (result["constant_answer"], result["constant_accuracy"]) == ("yes", 5 / 8)
    assert result["constant_macro_f1"] == pytest.approx((2 * 5 / (8 + 5)) / 2)
    assert result["classes"]["no"] == {"rows": 3, "predicted": 3, "correct": 2}
    low, high = result["accuracy_interval"]
    assert 0 <= low < 5 / 8 < high <= 1


def test_a_response_that_is_no_answer_is_refused() -> None:
    with pytest.raises(InputError, match=r"x row 2: response ' perhaps' is none of the answers ' yes', ' no'"):
        summarise(np.zeros(2, int), [Example("p", " no"), Example("p", " perhaps", "x row 2")], (" yes", " no"))
    with pytest.raises(InputError, match="at least one"):
        summarise(np.zeros(0, int), [], (" yes",))


def test_a_model_that_overflows_gets_no_score(tokenizer) -> None:
    params = {**PARAMS, "norm": PARAMS["norm"] * np.nan}
    with pytest.raises(InputError, match="not finite"):
        label_scores(params, SPEC, tokenizer, examples(3), LABELS)
