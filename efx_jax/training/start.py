"""Where a run starts: from another run's training, or from its checkpoint, rewriting whatever came after that."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from efx_jax.config import AtpConfig, Config, DistillConfig, LoraConfig, PruneConfig
from efx_jax.config_io import read_config
from efx_jax.config_rules import validate
from efx_jax.errors import InputError
from efx_jax.files import atomic_write
from efx_jax.parallel.hosts import meet
from efx_jax.training import checkpoint, log
from efx_jax.training.rows import taught_texts
from efx_jax.training.state import RunState
from efx_jax.weights.peft import adapter_settings

FREE_SECTIONS = ("mesh", "profile", "log")
"""Sections that say where and how a run is computed, not what it computes: they may change when it is resumed."""
FREE_SETTINGS = (
    "train.micro_batch",
    "train.micro_tokens",
    "train.remat",
    "train.deterministic",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "prune.calibration_tokens",
    "prune.chunk_mib",
    "eval.batch_size",
)
"""Single settings of the same kind: a run that did not fit into memory can resume in smaller parts."""


def with_adapter(config: Config) -> Config:
    """The settings with the rank, alpha, rslora and targets of the adapter that the run starts from, if any.

    Raises:
        InputError: there is no adapter there, one of these settings is neither the adapter's nor its default, or the
            other settings are incompatible with the adapter's.
    """
    if not config.lora.adapter:
        return config
    found, default = adapter_settings(config.lora.adapter), LoraConfig()
    lora = dataclasses.replace(config.lora, **dataclasses.asdict(found))
    for field in dataclasses.fields(found):
        asked, own = getattr(config.lora, field.name), getattr(lora, field.name)
        if asked not in (getattr(default, field.name), own) and set(_several(asked)) != set(_several(own)):
            raise InputError(
                f"lora.{field.name}: expected {_text(own)}, that of lora.adapter {config.lora.adapter}, found "
                f"{_text(asked)}; leave lora.{field.name} out, or start without the adapter"
            )
    adapted = dataclasses.replace(config, lora=lora)
    validate(adapted)
    return adapted


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _text(value: Any) -> str:
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in _several(value))


def unpruned(config: Config) -> Config:
    """The same training without pruning, with all settings that matter only to pruning at their defaults."""
    return dataclasses.replace(config, prune=PruneConfig(sparsity=0.0), atp=AtpConfig(), distill=DistillConfig())


def different_settings(first: Config, second: Config) -> list[str]:
    """Names of the differing settings that make the two configs different runs."""
    names = [
        f"{section.name}.{field}".rstrip(".")
        for section in dataclasses.fields(Config)
        if section.name not in FREE_SECTIONS
        for field in _differing(getattr(first, section.name), getattr(second, section.name))
    ]
    return [name for name in names if name not in FREE_SETTINGS]


def _differing(first: Any, second: Any) -> list[str]:
    if not dataclasses.is_dataclass(first):
        return [""] if first != second else []
    fields = [field.name for field in dataclasses.fields(first)]
    return [name for name in fields if getattr(first, name) != getattr(second, name)]


def take_over(
    trunk: Path | None,
    config: Config,
    fresh: RunState,
    template_of: Callable[[Config], RunState],
    first_event: int,
    origin: str,
    output: Path,
) -> tuple[RunState, bool, bool, dict[str, Any]] | None:
    """Takes over the state and notes after the updates that another run shares with this one; copies its logs so far.

    Until its first event a run is plain LoRA.

    Args:
        trunk: folder of a finished run with the same settings that prunes nothing, or None. Its latest checkpoint up
            to the first event is used.
        config: the settings of the run that starts.
        fresh: the state in which it would otherwise begin.
        template_of: gives that state, or its shapes and shardings, for other settings; see `checkpoint.restore`.
        first_event: step of the run's first event.
        origin: fingerprint of the current base and data.
        output: the run's folder.

    Returns:
        What `checkpoint.restore` returns; or None if there is nothing to take over: ATP searches from the first update
        on, the best model before the event (`eval.best`) would not belong to this run, and a run that prunes nothing
        has no distillation text among its rows.

    Raises:
        InputError: the trunk's training settings differ, or it prunes.
    """
    if trunk is None or config.prune.score == "atp" or config.eval.best or taught_texts(config):
        return None
    other = read_config(trunk / "config.yaml")
    differing = different_settings(unpruned(other), unpruned(config))
    if differing or other.prune.sparsity:
        names = ", ".join(differing or ["prune.sparsity"])
        raise InputError(f"{trunk}: is not this training without pruning ({names}); leave it out")
    with checkpoint.open_checkpoints(trunk / "checkpoints", config.train.keep) as manager:
        step = max((step for step in manager.all_steps() if step <= first_event), default=0)
        found = checkpoint.restore(manager, template_of(other), {}, origin, step) if step else None
    if found is None:
        return None
    if jax.process_index() == 0:
        # Evaluation comes after the event of its step.
        for name, last in (("metrics.jsonl", step), ("evaluations.jsonl", step - 1 if step == first_event else step)):
            if (trunk / name).exists():
                atomic_write(output / name, (trunk / name).read_text())
                log.cut_metrics(output / name, last)
    meet()
    return dataclasses.replace(fresh, train=found[0].train), False, False, found[3]


def tidy(output: Path, start: int, steps: int, waiting: bool) -> None:
    """Removes what a run that resumes at step `start` will write again."""
    log.cut_metrics(output / "metrics.jsonl", start)
    # Evaluation comes after the event of its step.
    log.cut_metrics(output / "evaluations.jsonl", start - 1 if waiting else start)
    if start < steps:
        # Whatever was exported before belongs to a different training.
        shutil.rmtree(output / "export", ignore_errors=True)
    if not waiting:
        # Blocks of an event whose checkpoint was never completed: retraining up to it may give a different model.
        shutil.rmtree(output / "event", ignore_errors=True)
