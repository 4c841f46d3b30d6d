"""Where a run starts: with what another has learned, or by writing again what it wrote after its checkpoint."""

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
"""Settings that say where and how a run is computed, not what it is: they may change when it is resumed."""
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
"""Single ones that are no more than that: a run that did not fit goes on in smaller parts."""


def with_adapter(config: Config) -> Config:
    """The settings with the rank, alpha, rslora and targets of the adapter that the run starts from, if it does.

    Raises:
        InputError: no adapter there, one of these is set to something else than the adapter's and than its default, or
            the settings exclude what the adapter brings.
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
    """The same training without pruning, where no setting of a method has a say."""
    return dataclasses.replace(config, prune=PruneConfig(sparsity=0.0), atp=AtpConfig(), distill=DistillConfig())


def different_settings(first: Config, second: Config) -> list[str]:
    """Names of the settings that make two runs different ones."""
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
    """The state and the notes after the updates that another run has done for this one, and its logs so far.

    Until its first event a run is plain LoRA.

    Args:
        trunk: folder of a finished run of the same settings that prunes nothing, or None. Its latest checkpoint up to
            the first event is taken.
        config: the settings of the run that starts.
        fresh: the state with which it would begin.
        template_of: the same of a run of other settings, or shapes and places in its stead, see `checkpoint.restore`.
        first_event: step of the run's first event.
        origin: fingerprint of the base and the data at hand.
        output: the run's folder.

    Returns:
        What `checkpoint.restore` returns; or None: there is nothing to take over. ATP searches from the first update
        on, the best model of before the event (`eval.best`) would not be one of this run, and a run that prunes nothing
        has no text that a teacher teaches among its rows.

    Raises:
        InputError: the trunk is another training.
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
        # A model is evaluated after the event of its step.
        for name, last in (("metrics.jsonl", step), ("evaluations.jsonl", step - 1 if step == first_event else step)):
            if (trunk / name).exists():
                atomic_write(output / name, (trunk / name).read_text())
                log.cut_metrics(output / name, last)
    meet()
    return dataclasses.replace(fresh, train=found[0].train), False, False, found[3]


def tidy(output: Path, start: int, steps: int, waiting: bool) -> None:
    """Removes what a run that goes on from step `start` writes again."""
    log.cut_metrics(output / "metrics.jsonl", start)
    # A model is evaluated after the event of its step.
    log.cut_metrics(output / "evaluations.jsonl", start - 1 if waiting else start)
    if start < steps:
        # Whatever was exported before belongs to another training.
        shutil.rmtree(output / "export", ignore_errors=True)
    if not waiting:
        # Of an event whose own checkpoint was never whole: training up to it again need not give the same model.
        shutil.rmtree(output / "event", ignore_errors=True)
