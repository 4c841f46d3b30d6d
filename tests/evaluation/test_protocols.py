"""An answer is the likeliest label, or what generated text says; free text is always generated."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest

from efx_jax.data.prompts import Example
from efx_jax.data.tasks import Task
from efx_jax.errors import InputError
from efx_jax.evaluation import protocols
from efx_jax.evaluation.generation import generate_texts
from efx_jax.evaluation.protocols import check_protocol, describe_task, evaluate_task
from efx_jax.evaluation.tasks import label_scores
from efx_jax.weights.hf import load_pretrained, load_tokenizer

pytest.importorskip("transformers")

ROWS = [
    Example("fever cough", " yes", "rows.jsonl row 1"),
    Example("old skin rash", " no", "rows.jsonl row 2"),
    Example("heart", " yes", "rows.jsonl row 3"),
]
CHOICE = Task("triage", ROWS, (" yes", " no"), new_tokens=5, note="a stand-in")
TEXT = Task("notes", [Example("fever", " mild chronic rash"), Example("lung", " new pain")], (), new_tokens=9)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return (*load_pretrained(tiny_folder), load_tokenizer(tiny_folder))


class Says:
    """Stands in for `generate_texts`: a list of texts for every run, and what it was called with."""

    def __init__(self, *texts: Sequence[str]) -> None:
        self.texts, self.calls = list(texts), []

    def __call__(self, params, spec, tokenizer, examples, max_new_tokens, adapters=None, masks=None, **options):
        self.calls.append({"rows": len(examples), "max_new_tokens": max_new_tokens} | options)
        return self.texts


@pytest.fixture
def evaluate_with(model, monkeypatch):
    def evaluate(says: Says, task: Task, protocol: str, **options):
        monkeypatch.setattr(protocols, "generate_texts", says)
        return evaluate_task(*model, task, protocol, **options)

    return evaluate


def test_likelihood_takes_the_likeliest_label(model) -> None:
    result, records = evaluate_task(*model, CHOICE, "likelihood")
    scores = label_scores(*model, ROWS, CHOICE.labels)
    assert [[*record["scores"].values()] for record in records] == scores.tolist()
    assert [record["prediction"] for record in records] == [("yes", "no")[row.argmax()] for row in scores]
    right = np.mean([record["prediction"] == record["gold"] for record in records])
    assert (result["accuracy"], result["unparseable"], result["runs"]) == (pytest.approx(right), 0.0, 1)
    assert [record["origin"] for record in records] == [row.origin for row in ROWS]
    assert [record["gold"] for record in records] == ["yes", "no", "yes"]


def test_adapters_and_masks_reach_the_scores(model) -> None:
    masks = {"down_proj": jax.numpy.zeros(model[0]["layers"]["down_proj"].shape, bool)}
    _, records = evaluate_task(*model, CHOICE, "likelihood", None, masks)
    expected = label_scores(*model, ROWS, CHOICE.labels, None, masks)
    assert [[*record["scores"].values()] for record in records] == expected.tolist()
    assert (expected != label_scores(*model, ROWS, CHOICE.labels)).any()


def test_greedy_reads_the_generated_text_and_counts_what_it_cannot_read(evaluate_with) -> None:
    says = Says([" Yes.", "I do not know", "no"])
    result, records = evaluate_with(says, CHOICE, "greedy", batch_size=2, compute_dtype="float32")
    assert says.calls == [
        {"rows": 3, "max_new_tokens": 5, "batch_size": 2, "compute_dtype": "float32", "sampling": None}
        | {"seeds": says.calls[0]["seeds"]}
    ]
    assert [record["prediction"] for record in records] == ["yes", None, "no"]
    assert [record["answer"] for record in records] == [" Yes.", "I do not know", "no"]
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["unparseable"] == pytest.approx(1 / 3)
    # yes: 1 right, said once, true twice; no: never right.
    assert result["macro_f1"] == pytest.approx((2 * 1 / (1 + 2) + 0) / 2)
    assert result["classes"]["no"] == {"rows": 1, "predicted": 1, "correct": 0}


def test_an_answer_may_be_as_long_as_the_longest_label(evaluate_with) -> None:
    long = Task("triage", [Example("heart", " no")], (" no", " old rash ." * 3), new_tokens=5)
    says = Says(["no"])
    evaluate_with(says, long, "greedy")
    assert says.calls[0]["max_new_tokens"] == 9


def test_sampled_reports_mean_and_deviation_over_runs_of_different_seeds(evaluate_with) -> None:
    says = Says(["yes", "no", "yes"], ["yes", "yes", "?"], ["no", "no", "yes"])
    result, records = evaluate_with(says, CHOICE, "sampled", runs=3, seed=7)
    accuracies = [1, 1 / 3, 2 / 3]
    assert result["accuracy_runs"] == pytest.approx(accuracies)
    assert result["accuracy"] == pytest.approx(np.mean(accuracies))
    assert result["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert (result["unparseable"], result["runs"], result["rows"]) == (pytest.approx(1 / 9), 3, 3)
    assert result["classes"]["yes"] == {"rows": 2, "predicted": 5, "correct": 4}
    assert [(record["run"], record["row"]) for record in records] == [
        (run, row) for run in range(3) for row in range(3)
    ]
    sampling = says.calls[0]["sampling"]
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.9, 50, 0.9)
    [seeds] = [call["seeds"] for call in says.calls]
    assert len(set(seeds)) == 3
    again = Says(*says.texts)
    evaluate_with(again, CHOICE, "sampled", runs=3, seed=7)
    assert [call["seeds"] for call in again.calls] == [seeds]


@pytest.mark.parametrize("protocol", ["likelihood", "greedy"])
def test_free_text_is_generated_greedily_and_scored_by_rouge(protocol, evaluate_with) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge2"], use_stemmer=True)
    texts = ["mild chronic pain", "old rash"]
    says = Says(texts)
    result, records = evaluate_with(says, TEXT, protocol)
    assert (says.calls[0]["sampling"], says.calls[0]["max_new_tokens"]) == (None, 9)
    expected = [scorer.score(row.response, text)["rouge2"].fmeasure for row, text in zip(TEXT.test, texts, strict=True)]
    assert [record["rouge2"] for record in records] == expected
    assert result["rouge2"] == pytest.approx(np.mean(expected))
    assert (result["protocol"], "accuracy" in result, "prediction" in records[0]) == ("greedy", False, False)


def test_sampled_free_text_has_a_deviation_too(evaluate_with) -> None:
    pytest.importorskip("rouge_score")
    says = Says(["mild chronic rash", "new pain"], ["heart", "new pain"])
    result, _ = evaluate_with(says, TEXT, "sampled", runs=2)
    assert result["rouge1_runs"] == [1.0, 0.5]
    assert result["rouge1_std"] == pytest.approx(np.std([1.0, 0.5], ddof=1))
    assert result["rouge1_interval"] == [0.5, 1.0]


def test_a_description_changes_with_the_prompts_and_the_responses() -> None:
    found = describe_task(CHOICE, "likelihood", 4, "mean")
    assert (found["protocol"], found["runs"], found["rows"], found["note"]) == ("likelihood", 1, 3, "a stand-in")
    assert (found["normalize"], found["new_tokens"]) == ("mean", None)
    written = describe_task(TEXT, "likelihood", 4, "mean")
    assert (written["normalize"], written["new_tokens"]) == (None, TEXT.new_tokens)
    shorter = Task("triage", ROWS[:2], CHOICE.labels)
    other = Task("triage", [*ROWS[:2], Example("heart", " no")], CHOICE.labels)
    hashes = {describe_task(task, "likelihood", 4, "sum")["rows_sha256"] for task in (CHOICE, shorter, other)}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("task", "protocol", "message"),
    [
        (Task("triage", [], ()), "likelihood", "task triage: expected at least one test row"),
        (Task("triage", [Example("heart", " so", "x row 1")], (" yes",)), "greedy", "x row 1: response ' so' is none"),
        (Task("triage", [Example("rash " * 60, " no", "x row 1")], (" no",)), "greedy", r"60 tokens; expected 1 to 54"),
        (
            Task("triage", [Example("rash " * 65, " no", "x row 1")], (" no",)),
            "likelihood",
            r"65 tokens; expected 1 to 64",
        ),
        (Task("triage", [Example("", "free", "x row 1")], ()), "sampled", "x row 1: the prompt has 0 tokens"),
        (Task("triage", [Example("heart", "No")], ("No", "no")), "sampled", "look the same in generated text"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before(model, task, protocol, message) -> None:
    _, spec, tokenizer = model
    with pytest.raises(InputError, match=message):
        check_protocol(spec, tokenizer, task, protocol)


def test_what_can_be_evaluated_passes(model) -> None:
    _, spec, tokenizer = model
    for protocol in ("likelihood", "greedy", "sampled"):
        check_protocol(spec, tokenizer, CHOICE, protocol)
        check_protocol(spec, tokenizer, TEXT, protocol)


def test_what_the_model_writes_is_read(model) -> None:
    _, greedy = evaluate_task(*model, CHOICE, "greedy")
    assert [[record["answer"] for record in greedy]] == generate_texts(*model, ROWS, CHOICE.new_tokens)

    _, sampled = evaluate_task(*model, CHOICE, "sampled", runs=2)
    runs = [[record["answer"] for record in sampled if record["run"] == run] for run in (0, 1)]
    assert runs[0] != runs[1]
    assert evaluate_task(*model, CHOICE, "sampled", runs=2)[1] == sampled
