"""Writes a model that lost units: its own sizes in `config.json`, everything else from the original checkpoint."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from efx_jax.model.spec import ModelSpec
from efx_jax.weights.config_json import read_json
from efx_jax.weights.fetch import local_path
from efx_jax.weights.hf import write_folder
from efx_jax.weights.params import params_source


def save_sliced(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    spec: ModelSpec,
    source: str | os.PathLike[str] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a sliced model as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens.

    Args:
        path: the folder to make.
        params: the tree of `param_shapes(spec)`.
        spec: the smaller model.
        source: checkpoint that it was cut from, whose `config.json` is carried over except for the sizes, and whose
            tokenizer and extras are copied.
        finish: called with the complete folder, before it gets its final name.

    Raises:
        InputError: `path` exists, the disk is full, `params` do not fit `spec`, or `source` is another model.
    """
    extras = None if source is None else local_path(source)
    original = read_json(extras / "config.json") if extras is not None and extras.is_dir() else None
    if original is not None:
        original |= {
            "intermediate_size": spec.intermediate_size,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
        }
    write_folder(path, params_source(params, spec, Path(path)), spec, original, extras, finish=finish)
