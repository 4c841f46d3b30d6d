"""The evaluate.Metric classes work offline and equal hand-worked values."""

import math

import numpy as np
import pytest

from efx_jax.evaluation.scores import accuracy, macro_f1

pytest.importorskip("evaluate")
pytest.importorskip("datasets")
metrics = pytest.importorskip("efx_jax.evaluation.metrics")


def test_accuracy_and_macro_f1_equal_the_numpy_scores() -> None:
    pytest.importorskip("sklearn")
    reference, predicted = np.random.default_rng(0).integers(0, 6, (2, 90))
    result = metrics.Accuracy().compute(predictions=predicted, references=reference)
    assert result["accuracy"] == pytest.approx(accuracy(predicted, reference)[0])
    result = metrics.MacroF1().compute(predictions=predicted, references=reference)
    assert result["macro_f1"] == pytest.approx(macro_f1(predicted, reference, 6)[0])


def test_rouge_equals_a_worked_example() -> None:
    pytest.importorskip("rouge_score")
    # 3 of 3 predicted and 3 of 4 reference words; 1 of 2 and 1 of 3 pairs; longest common subsequence "the sat".
    result = metrics.Rouge().compute(predictions=["the sat cat"], references=["the cat sat down"])
    assert result["rouge1"] == pytest.approx(2 * 1.0 * 0.75 / 1.75)
    assert result["rouge2"] == pytest.approx(0.0)
    assert result["rougeL"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    both = metrics.Rouge().compute(predictions=["the sat cat", "a b"], references=["the cat sat down", "a b"])
    assert both["rougeL"] == pytest.approx((result["rougeL"] + 1) / 2)


def test_rouge_stems_words_where_it_is_asked_to_as_evaluates_does() -> None:
    pytest.importorskip("rouge_score")
    texts = {"predictions": ["studies running"], "references": ["study run"]}
    assert metrics.Rouge().compute(**texts, use_stemmer=True)["rouge1"] == 1.0
    assert metrics.Rouge().compute(**texts)["rouge1"] == 0.0


def test_an_answer_that_could_not_be_read_is_wrong_and_no_class() -> None:
    pytest.importorskip("sklearn")
    predicted, reference = np.asarray([0, -1, 1, -1]), np.asarray([0, 0, 1, 1])
    assert metrics.Unparseable().compute(predictions=predicted) == {"unparseable": 0.5}
    assert metrics.Accuracy().compute(predictions=predicted, references=reference) == {"accuracy": 0.5}
    assert metrics.MacroF1().compute(predictions=predicted, references=reference)["macro_f1"] == pytest.approx(2 / 3)


def test_perplexity_divides_sums_and_does_not_average_windows() -> None:
    result = metrics.Perplexity().compute(predictions=[10.0, 1.0], references=[5, 1])
    assert result["perplexity"] == pytest.approx(math.exp(11 / 6))
