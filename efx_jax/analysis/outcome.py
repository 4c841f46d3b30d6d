"""What a finished run has made of its base, in the form that a bundle stores."""

import dataclasses
from pathlib import Path

import numpy as np

from efx_jax.analysis.held import held_adapters, read_checkpoint, run_linears, run_masks
from efx_jax.analysis.runs import open_run
from efx_jax.errors import InputError
from efx_jax.weights.bundle_write import Outcome
from efx_jax.weights.config_json import read_json
from efx_jax.weights.sparsity import Asked, pattern_of


def run_outcome(folder: Path) -> Outcome:
    """What a finished run has exported, from its checkpoint at that step.

    Raises:
        InputError: not a run, not finished, whole units cut out (ATP), or the checkpoint is missing or damaged.
    """
    run = open_run(folder)
    config = run.config
    if config.prune.score == "atp" and config.prune.sparsity:
        raise InputError(
            f"{folder}: has cut out whole units (prune.score atp): its export has other shapes than its base "
            "and is small as it is; ship the export"
        )
    if not (folder / "summary.json").is_file() or not (folder / "export").is_dir():
        raise InputError(f"{folder}: is not finished; expected summary.json and export/; let the run finish first")
    step = read_json(folder / "summary.json")["steps"]
    if config.eval.best and (folder / "best" / str(step)).is_dir():
        run = dataclasses.replace(run, steps=(step,), kind="best")
    checkpoint = read_checkpoint(run, step)
    masks = run_masks(run, checkpoint)

    def moved(name: str) -> np.ndarray:
        return run_linears(run, checkpoint, [name])[name]

    return Outcome(
        base=config.model.path,
        dtype=None if config.model.dtype == "keep" else config.model.dtype,
        adapters=held_adapters(run, step),
        masks=masks,
        moved=moved if checkpoint.base_moved else None,
        asked=Asked(dict.fromkeys(masks, pattern_of(config.prune.group)), config.prune.sparsity),
        export=folder / "export",
    )
