"""Where metrics go: a line of JSON per logged step, always; TensorBoard and W&B on request."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efx_jax.config import Config
from efx_jax.errors import InputError
from efx_jax.files import atomic_write

Row = dict[str, float]
Sink = Callable[[Row], None]


def cut_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step`, which a resumed run writes again, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            kept.append(line + "\n")
    atomic_write(path, "".join(kept))


def append_row(path: Path, row: Row) -> None:
    """Writes one line of metrics.jsonl; what is not finite becomes null."""
    finite = {name: value if abs(value) < float("inf") else None for name, value in row.items()}
    with path.open("a") as stream:
        stream.write(json.dumps(finite) + "\n")


def open_sinks(config: Config, output: Path) -> list[Sink]:
    """The extra destinations that the settings ask for.

    Raises:
        InputError: a destination whose package is not installed.
    """
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(_tensorboard(output))
    if config.log.wandb:
        sinks.append(_wandb(config, output))
    return sinks


def _tensorboard(output: Path) -> Sink:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError('log.tensorboard: tensorboardX is missing; pip install "efx_jax[tensorboard]"') from error
    writer = SummaryWriter(str(output / "tensorboard"))

    def write(row: Row) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, int(row["step"]))

    return write


def _wandb(config: Config, output: Path) -> Sink:
    try:
        import wandb
    except ImportError as error:
        raise InputError('log.wandb: wandb is missing; pip install "efx_jax[wandb]"') from error
    import dataclasses

    run: Any = wandb.init(project="efx_jax", name=output.name, dir=str(output), config=dataclasses.asdict(config))

    def write(row: Row) -> None:
        run.log(row, step=int(row["step"]))

    return write
