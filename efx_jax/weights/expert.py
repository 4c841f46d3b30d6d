"""The export of a run: base, adapters and masks merged into a dense Hugging Face folder, audited before it appears."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from efx_jax.lora import Adapters
from efx_jax.model.spec import ModelSpec
from efx_jax.weights.config_json import read_json
from efx_jax.weights.fetch import local_path
from efx_jax.weights.hf import open_folder, write_folder
from efx_jax.weights.merged import merged_source
from efx_jax.weights.source import TensorSource
from efx_jax.weights.sparsity import Asked, metadata_before, write_audit


def write_expert(
    path: str | os.PathLike[str],
    base: TensorSource,
    spec: ModelSpec,
    adapters: Adapters | None,
    masks: Mapping[str, Any] | None,
    origin: str | os.PathLike[str],
    asked: Asked,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes mask * (W + scale * B A), see `weights.merged`, as a Hugging Face folder with `efx_sparsity.json`.

    With several processes, each writes what its devices hold, and the first reads everything for the audit.

    Args:
        path: the folder to make.
        base: W in the dtypes of the export.
        spec: the model.
        adapters: the run's adapters, or None.
        masks: name -> bool `[L,O,I]` or uint8 `[L,O,ceil(I/8)]`, or None.
        origin: the checkpoint whose `config.json`, tokenizer and extras are carried over.
        asked: what the audit checks the zeros against.
        finish: called with the folder after the audit, before it gets its final name.

    Raises:
        InputError: `path` exists, the disk is full, `origin` is another model, or the audit finds too few zeros.
    """
    extras = local_path(origin)
    original = read_json(extras / "config.json") if extras.is_dir() else None

    def audit(folder: Path) -> None:
        write_audit(folder, open_folder(folder), spec, asked)
        if finish is not None:
            finish(folder)

    tensors = merged_source(base, spec, adapters, masks)
    write_folder(path, tensors, spec, original, extras, metadata=metadata_before(spec, asked), finish=audit)
