"""Where metrics go: always a line of JSON per logged step; TensorBoard and W&B on request."""

import contextlib
import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from efx_jax.config import Config
from efx_jax.errors import InputError
from efx_jax.files import atomic_write

Row = dict[str, float]
Sink = Callable[[Row], None]


def cut_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step`, which a resumed run will write again, and a half-written last line."""
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
    """Appends one line to metrics.jsonl or evaluations.jsonl; values that are not finite become null."""
    finite = {name: value if abs(value) < float("inf") else None for name, value in row.items()}
    with path.open("a") as stream:
        stream.write(json.dumps(finite) + "\n")


def check_sinks(config: Config) -> None:
    """Refuses a destination whose package is not installed, before the run's folder is created.

    Raises:
        InputError: the package is missing.
    """
    for wanted, setting, package in (
        (config.log.tensorboard, "tensorboard", "tensorboardX"),
        (config.log.wandb, "wandb", "wandb"),
    ):
        if wanted:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise InputError(f'log.{setting}: {package} is missing; pip install "efx_jax[{setting}]"') from error


@contextlib.contextmanager
def open_sinks(config: Config, output: Path) -> Iterator[list[Sink]]:
    """The extra destinations that the settings enable; they write into the run's folder, which must exist.

    They use the metric names of metrics.jsonl and evaluations.jsonl. On exit, anything still buffered is written.
    """
    with contextlib.ExitStack() as stack:
        sinks: list[Sink] = []
        if config.log.tensorboard:
            sinks.append(_tensorboard(output, stack))
        if config.log.wandb:
            sinks.append(_wandb(config, output, stack))
        yield sinks


def _tensorboard(output: Path, stack: contextlib.ExitStack) -> Sink:
    from tensorboardX import SummaryWriter

    opened: list[Any] = []

    def write(row: Row) -> None:
        if not opened:
            # TensorBoard then shows only once what a resumed run writes again from this step on.
            opened.append(SummaryWriter(str(output / "tensorboard"), purge_step=int(row["step"])))
            stack.callback(opened[0].close)
        for name, value in row.items():
            opened[0].add_scalar(name, value, int(row["step"]))

    return write


def _wandb(config: Config, output: Path, stack: contextlib.ExitStack) -> Sink:
    import wandb

    # A resumed run continues its W&B run; for repeated steps W&B keeps the first values.
    file = output / "wandb_id"
    known = file.read_text() if file.exists() else None
    run: Any = wandb.init(
        # Read here because an argument would override W&B's own variables.
        project=os.environ.get("WANDB_PROJECT", "efx_jax"),
        name=os.environ.get("WANDB_NAME", output.name),
        dir=str(output),
        config=dataclasses.asdict(config),
        id=known,
        resume="allow" if known else None,
    )
    stack.callback(run.finish)
    if known is None:
        atomic_write(file, run.id)

    def write(row: Row) -> None:
        run.log(row, step=int(row["step"]))

    return write
