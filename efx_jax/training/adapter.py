"""The adapters of a run as a PEFT folder, for runs whose trained model is base + adapter."""

import os
from pathlib import Path

from efx_jax.analysis.held import moved_and_masked, run_adapters
from efx_jax.analysis.runs import Run, open_shipped
from efx_jax.analysis.wording import base_on_hub
from efx_jax.errors import InputError
from efx_jax.model.spec import spec_from_config
from efx_jax.weights.fetch import local_path
from efx_jax.weights.hf import open_checkpoint
from efx_jax.weights.peft import save_adapter


def export_adapter(src: str | os.PathLike[str], dst: str | os.PathLike[str], dtype: str = "float32") -> str:
    """Writes the adapters of the model that a run exports to a folder that `peft` loads on top of the run's base.

    Args:
        src: folder of a run.
        dst: the folder to create.
        dtype: dtype of the tensors: "float32", "bfloat16" or "float16".

    Returns:
        What was written and what it lacks, one line each.

    Raises:
        InputError: not a run, a run whose base has changed or that has cut units out, or `dst` exists.
    """
    run = open_shipped(Path(src))
    step = run.steps[0]
    _check_is_one_adapter(run, step)
    moved, masked = moved_and_masked(run, step)
    if moved:
        raise InputError(
            f"{src}: the prune events of this run have moved its base ({_mover(run)}), so its base and an adapter are "
            "not the model that it has trained; use its export, or pack it with convert_weights.py bundle"
        )
    adapters = run_adapters(run, step)
    assert adapters is not None
    lora = run.config.lora
    exported = run.folder / "export"
    spec = spec_from_config(open_checkpoint(exported if exported.is_dir() else run.config.model.path).config)
    # peft looks there for the base; the quickstart's own base is a four-bit copy of the one on the Hub.
    base = str(base_on_hub(run.config) or _base_path(run.config.model.path))
    save_adapter(dst, adapters, spec, base, dtype, lora.rslora)
    lines = [f"wrote {dst}: rank {lora.rank}, after {step} updates, for the base {base}"]
    if masked:
        lines.append(
            "the mask is not in the adapter: base + adapter is this run's model before its zeros; "
            "convert_weights.py bundle carries the mask too"
        )
    return "\n".join(lines)


def _base_path(path: str) -> str | Path:
    """Where peft finds the base from any working directory; for another run's folder, its export."""
    return local_path(path).absolute() if Path(path).expanduser().exists() else path


def _check_is_one_adapter(run: Run, step: int) -> None:
    if step == 0:
        raise InputError(f"{run.folder}: has trained no adapter yet; train it first")
    if run.config.prune.score == "atp" and run.config.prune.sparsity:
        raise InputError(
            f"{run.folder}: prune.score atp has cut units out of the base and of the adapters, which then fit no other "
            "model; use its export"
        )


def _mover(run: Run) -> str:
    prune = run.config.prune
    return "prune.merge_each_event" if prune.merge_each_event else f"prune.recovery {prune.recovery}"
