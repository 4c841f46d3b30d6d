"""The sequences that a run trains on: its own rows, and text without labels that only the teacher uses."""

import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from efx_jax.config import Config
from efx_jax.data.tasks import Data, load_text
from efx_jax.data.tokens import Tokenized, text_windows, tokenize
from efx_jax.errors import FallbackWarning, InputError
from efx_jax.training.step import has_teacher

Texts = Mapping[str, list[str]]


def taught_texts(config: Config) -> list[str]:
    """Names of the texts that training reads besides its rows: none without a teacher to teach them."""
    return [config.distill.text] if config.distill.text and has_teacher(config) else []


def calibration_texts(config: Config) -> list[str]:
    """Names of the texts that calibration draws from, besides the training rows."""
    if config.prune.sparsity == 0 or config.prune.score == "atp":
        return []
    return [source for source in config.prune.calibration if source != "train"]


def read_texts(names: Iterable[str], config: Config) -> dict[str, list[str]]:
    """Documents by name, each text read once; C4 is left out with a warning where it cannot be read.

    Raises:
        InputError: any other text cannot be read.
    """
    texts: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        try:
            texts[name] = load_text(name, config.data)
        except InputError as error:
            # The paper calibrates on C4. The perplexity text would do too, but it is what the result is measured on.
            if name != "c4":
                raise
            warnings.warn(f"the training rows instead of C4: {error}", FallbackWarning, stacklevel=2)
    return texts


def own_rows(config: Config, data: Data, tokenizer: Any) -> list[Tokenized]:
    """The training rows as sequences."""
    return tokenize(data.train, tokenizer, config.data.max_length, config.data.loss_on)


def training_rows(config: Config, own: list[Tokenized], tokenizer: Any, texts: Texts) -> list[Tokenized]:
    """The run's own rows, then enough of `distill.text` to make up `distill.text_share` of all tokens.

    Batches are drawn from all of them alike. A text that is too short for its share is repeated.

    Args:
        config: the settings.
        own: the run's own rows.
        tokenizer: a Hugging Face tokenizer.
        texts: from `read_texts`.
    """
    distill = config.distill
    if not set(taught_texts(config)) & texts.keys():
        return own
    share = distill.text_share / (1 - distill.text_share)
    tokens = round(share * sum(len(row.tokens) for row in own))
    name = f"distill.text {distill.text}"
    windows = text_windows(texts[distill.text], tokenizer, config.data.max_length, max(2, tokens), name)
    silent = [Tokenized(window.tokens, np.zeros_like(window.loss)) for window in windows]
    held = itertools.accumulate(len(window.tokens) for window in itertools.cycle(silent))
    count = 1 + next(number for number, total in enumerate(held) if total >= tokens)
    return own + list(itertools.islice(itertools.cycle(silent), count))
