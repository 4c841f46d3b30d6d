"""The sequences that a run trains on: its own rows, and text without labels that only the teacher makes use of."""

import itertools
import warnings
from typing import Any

import numpy as np

from efx_jax.config import Config
from efx_jax.data.tasks import Data, load_text
from efx_jax.data.tokens import Tokenized, text_windows, tokenize
from efx_jax.errors import FallbackWarning, InputError
from efx_jax.training.step import has_teacher


def reads_text(config: Config) -> bool:
    """Whether training reads text beside its rows: a teacher has to teach it."""
    return bool(config.distill.text) and has_teacher(config)


def own_rows(config: Config, data: Data, tokenizer: Any) -> list[Tokenized]:
    """The training rows as sequences."""
    return tokenize(data.train, tokenizer, config.data.max_length, config.data.loss_on)


def training_rows(config: Config, own: list[Tokenized], tokenizer: Any) -> list[Tokenized]:
    """The run's own rows, then as much of `distill.text` as makes `distill.text_share` of all tokens.

    Batches are drawn from all of them alike. A text that is too short for its share comes again.

    Args:
        config: the settings.
        own: the run's own rows.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        InputError: a text that cannot be read; without C4 training does without it, with a warning.
    """
    if not reads_text(config):
        return own
    distill = config.distill
    try:
        texts = load_text(distill.text, config.data)
    except InputError as error:
        if distill.text != "c4":
            raise
        warnings.warn(f"training without the text of C4: {error}", FallbackWarning, stacklevel=2)
        return own
    share = distill.text_share / (1 - distill.text_share)
    tokens = round(share * sum(len(row.tokens) for row in own))
    windows = text_windows(texts, tokenizer, config.data.max_length, max(2, tokens))
    silent = [Tokenized(window.tokens, np.zeros_like(window.loss)) for window in windows]
    held = itertools.accumulate(len(window.tokens) for window in itertools.cycle(silent))
    count = 1 + next(number for number, total in enumerate(held) if total >= tokens)
    return own + list(itertools.islice(itertools.cycle(silent), count))
