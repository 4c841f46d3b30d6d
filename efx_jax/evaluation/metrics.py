"""`evaluate.Metric` classes that work offline, thin wrappers around scikit-learn and rouge-score.

`evaluate.load("accuracy")` downloads a script; these come with the package:
`Accuracy().compute(predictions=..., references=...)`. Importing this module needs the extra `hf`; nothing in training
imports it (see `evaluation/scores.py`). Classes are numbers from 0; a prediction of -1 is an answer that could not be
read.
"""

import math
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from efx_jax.evaluation.rouge import ROUGE, rouge_scores

_CLASSES = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
_TEXTS = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
_SUMS = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}


class Accuracy(evaluate.Metric):
    """Share of equal class numbers: {"accuracy": float}."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of predictions that equal the reference.", _CLASSES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        import sklearn.metrics

        return {"accuracy": float(sklearn.metrics.accuracy_score(references, predictions))}


class MacroF1(evaluate.Metric):
    """Unweighted mean of F1 over the classes that occur; -1 is not a class: {"macro_f1": float}."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Unweighted mean of the classes' F1.", _CLASSES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        import sklearn.metrics

        classes = sorted({*references, *predictions} - {-1})
        score = sklearn.metrics.f1_score(references, predictions, labels=classes, average="macro", zero_division=0)
        return {"macro_f1": float(score)}


class Unparseable(evaluate.Metric):
    """Share of predictions that are -1: {"unparseable": float}."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of answers that could not be read.", {"predictions": datasets.Value("int32")})

    def _compute(self, predictions: Sequence[int]) -> dict[str, float]:
        return {"unparseable": float(np.mean(np.asarray(predictions) == -1))}


class Rouge(evaluate.Metric):
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, in [0, 1]; `use_stemmer` reduces words to stems.

    As in `evaluate.load("rouge")` it is off by default; this project's results use it.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("ROUGE F-measures, averaged over rows.", _TEXTS)

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], use_stemmer: bool = False
    ) -> dict[str, float]:
        means = rouge_scores(predictions, references, use_stemmer).mean(axis=0)
        return {name: float(mean) for name, mean in zip(ROUGE, means, strict=True)}


class Perplexity(evaluate.Metric):
    """exp(sum / count): `predictions` are summed nats per window, `references` the predicted tokens per window."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("exp of the summed negative log-likelihood over the number of tokens.", _SUMS)

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        return {"perplexity": math.exp(math.fsum(predictions) / sum(references))}


def _info(description: str, features: dict[str, datasets.Value]) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description="", features=datasets.Features(features)
    )
