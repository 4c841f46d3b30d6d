"""What a run writes, in bytes by category, counted from shapes alone, and whether its disk has room for that."""

import dataclasses
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from efx_jax.config import Config, MeshConfig
from efx_jax.config_event import goes_by_block, keeps_scores
from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec, linear_shapes
from efx_jax.training.activations import FLOAT32, Layout
from efx_jax.training.memory import Bytes, resident_bytes

_GIB = 2**30


def disk_bytes(spec: ModelSpec, config: Config, dtype: str, events: Sequence[int], steps: int) -> Bytes:
    """The most that a run's folder holds at any time; Orbax compresses what it saves, zeros above all, to less.

    Args:
        spec: the model.
        config: the settings.
        dtype: of the stored weights.
        events: the steps of the run's prune events, in order.
        steps: updates of the run.
    """
    whole = dataclasses.replace(config, mesh=MeshConfig())
    layout = Layout(dtype, rows=1, length=1, events=len(events), fused_attention=False)
    held = resident_bytes(spec, whole, layout)
    saved = {name: size for name, size in held.items() if name not in ("weights", "teacher")}
    if len(events) > 1 and config.prune.ema < 1 and keeps_scores(config.prune):
        shapes = linear_shapes(spec)
        entries = sum(out_dim * in_dim for out_dim, in_dim in (shapes[name] for name in config.prune.targets))
        saved["moving average"] = FLOAT32 * spec.num_layers * entries
    # Checkpoints hold what an event produces only from that event on.
    moved = saved["linears of the first base"] + saved["masks"]
    every = config.train.checkpoint_every
    after = len(events) + ((steps - events[0]) // every + 1 if every else 1) if events else 0
    # The next checkpoint is complete before an old one is removed.
    most = config.train.keep + 1
    kept, pruned = min(most, 1 + len(events) + (steps // every if every else 0)), min(most, after)
    return {
        "checkpoints": kept * (sum(saved.values()) - moved) + pruned * moved,
        "best model": 2 * sum(saved.values()) if config.eval.best else 0,
        # The blocks of an event are gone by the time of the export.
        "export": max(held["weights"], moved if events and goes_by_block(config.prune) else 0),
    }


def refuse_small_disk(needed: Bytes, output: Path) -> None:
    """Compares what a run may write with its disk's free space, counting what the folder already holds as free.

    Args:
        needed: from `disk_bytes`.
        output: the run's folder, which need not exist.

    Raises:
        InputError: not even half of it fits; if at least half does, it only warns.
    """
    place = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    own = sum(file.stat().st_size for file in output.rglob("*") if file.is_file() and not file.is_symlink())
    total, room = sum(needed.values()), shutil.disk_usage(place).free + own
    if total <= room:
        return
    told = (
        f"{output}: the run writes up to {total / _GIB:,.1f} GiB ({disk_text(needed)}), and its disk has room for "
        f"{room / _GIB:,.1f}; make room, lower train.keep, or choose another --output"
    )
    if total > 2 * room:
        raise InputError(told)
    warnings.warn(told, stacklevel=2)


def disk_text(needed: Bytes) -> str:
    """The parts, in GiB."""
    return ", ".join(f"{name} {size / _GIB:,.1f}" for name, size in needed.items() if size)
