"""The tiny models of the tests, their words and their rows.

Where a test needs another number, `dataclasses.replace` names it there.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from efx_jax.model.rope import RopeSpec
from efx_jax.model.spec import ModelSpec

LLAMA = ModelSpec(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=64,
    rope=RopeSpec(),
)
# Eight devices divide it along any axis.
EVEN = dataclasses.replace(LLAMA, hidden_size=32, intermediate_size=64, num_heads=8, num_kv_heads=4)

WORDS = "<s> </s> <unk> fever cough rash joint pain heart lung skin blood yes no old new mild severe chronic ."
ROWS = (
    ("fever cough", "lung"),
    ("old rash mild", "skin ."),
    ("joint pain no fever", "chronic joint ."),
    ("heart pain severe new", "heart blood ."),
    ("no cough", "yes lung lung"),
)
TEST_ROWS = (("mild cough", "lung"), ("severe rash", "skin"), ("old heart pain", "heart"))


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer to which every one of `WORDS` is a token."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    ids = {word: i for i, word in enumerate(WORDS.split())}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Writes prompts and responses as JSON lines."""
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows]
    path.write_text("\n".join(lines) + "\n")
