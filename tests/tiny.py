"""The tiny models of the tests, their words and their rows.

Where a test needs another number, `dataclasses.replace` names it there.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.lora import Adapters
from efx_jax.model.rope import RopeSpec
from efx_jax.model.spec import LINEARS, ModelSpec, init_params, param_shapes, spec_from_config
from efx_jax.weights.hf import load_pretrained

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


def random_model(
    rng: np.random.Generator, model_type: str, heads: int, kv_heads: int
) -> tuple[ModelSpec, dict[str, Any], Adapters]:
    """D 16, F 24, H 4, L 2, V 31, rank 3, scale 2, norms that differ and a B that matters."""
    spec = spec_from_config(
        {
            "model_type": model_type,
            "vocab_size": 31,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 4,
            "rms_norm_eps": 1e-5,
        }
    )

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        if "norm" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
        return jnp.asarray(rng.standard_normal(shape) * (1.5 / np.sqrt(shape[-1])), jnp.float32)

    shapes = param_shapes(spec)
    layers = {name: draw(name, shape) for name, shape in shapes["layers"].items()}
    params = {name: draw(name, shape) for name, shape in shapes.items() if name != "layers"} | {"layers": layers}
    dims = {name: layers[name].shape for name in LINEARS}
    adapters = Adapters(
        lora_a={
            n: jnp.asarray(rng.standard_normal((c, 3, i)) / np.sqrt(i), jnp.float32) for n, (c, _, i) in dims.items()
        },
        lora_b={n: jnp.asarray(0.2 * rng.standard_normal((c, o, 3)), jnp.float32) for n, (c, o, _) in dims.items()},
        scale=2.0,
    )
    return spec, params, adapters


def strong_params(spec: ModelSpec) -> dict[str, Any]:
    """Matrices 8 times the usual size, so that tokens differ in likelihood."""
    usual = init_params(jax.random.key(0), spec)
    return jax.tree_util.tree_map_with_path(lambda path, x: x if "norm" in path[-1].key else 8 * x, usual)


def linears(folder: Path) -> dict[str, np.ndarray]:
    """The matrices of a checkpoint, `[L,O,I]`, as they are stored."""
    layers = load_pretrained(folder, dtype=None)[0]["layers"]
    return {name: np.asarray(leaf) for name, leaf in layers.items() if name.endswith("_proj")}


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
