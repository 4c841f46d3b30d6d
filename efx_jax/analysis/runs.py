"""Reading a run's folder: its settings, what its checkpoints hold, and rows that it was trained on."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from efx_jax.config import Config
from efx_jax.config_io import from_yaml
from efx_jax.data.batches import Batch, calibration_batches, round_up
from efx_jax.data.tasks import load_data
from efx_jax.data.tokens import tokenize
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, init_lora, lora_scale
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.weights.hf import load_pretrained, load_tokenizer
from efx_jax.weights.peft import load_adapter

_MULTIPLE = 32  # what calibration_batches rounds lengths up to


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that `train.py` has written: its settings, and the steps of which it holds a checkpoint, ascending.

    `kind` is the folder of those checkpoints: "checkpoints", or "best" for that of `eval.best`.
    """

    folder: Path
    config: Config
    steps: tuple[int, ...]
    kind: str = "checkpoints"

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What kind of checkpoint a step has: after how many events, under masks or not, with a base of its own or not."""

    step: int
    events: int
    masked: bool
    base_moved: bool


def open_run(folder: Path) -> Run:
    """Reads what a run is; no array yet.

    Raises:
        InputError: not a run, or settings that this version does not know.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder}: is not a run; expected a folder that train.py has written, with config.yaml")
    config = from_yaml(path.read_text(encoding="utf-8"), str(path))
    return Run(folder, config, _steps(folder / "checkpoints"))


def held_steps(run: Run) -> tuple[int, ...]:
    """The steps of a run's checkpoints, at least one.

    Raises:
        InputError: it holds none.
    """
    if not run.steps:
        raise InputError(
            f"{run.folder}: holds no checkpoint; expected one in {run.folder / 'checkpoints'}; train it first"
        )
    return run.steps


def choose_step(run: Run, asked: tuple[int, ...]) -> int:
    """The step to look at where only one is: the last of those asked for, else the run's last checkpoint.

    Raises:
        InputError: no checkpoint, or none of that step.
    """
    held = held_steps(run)
    step = max(asked, default=held[-1])
    if step not in held:
        raise InputError(
            f"{run.folder}: no checkpoint of step {step}; expected among {_listed(held)}; train with a larger "
            "train.keep"
        )
    return step


def open_shipped(folder: Path) -> Run:
    """The run with the one checkpoint whose model it exports: its best, where `eval.best` has found one, or its last.

    Raises:
        InputError: as `open_run`.
    """
    run = open_run(folder)
    best = _steps(folder / "best") if run.config.eval.best else ()
    if best:
        return dataclasses.replace(run, steps=best[-1:], kind="best")
    return dataclasses.replace(run, steps=held_steps(run)[-1:])


def dense_steps(run: Run) -> tuple[int, ...]:
    """The steps of the checkpoints that no prune event has come before, ascending.

    Raises:
        InputError: every checkpoint holds masks or a base that an event has moved.
    """
    dense = tuple(step for step in held_steps(run) if not _pruned(run, step))
    if not dense:
        raise InputError(
            f"{run.folder}: every checkpoint ({_listed(run.steps)}) is pruned; expected one from before the first "
            "event; train with prune.sparsity 0 and a small train.checkpoint_every"
        )
    return dense


def choose_steps(run: Run, asked: tuple[int, ...]) -> tuple[int, ...]:
    """The steps to look at: those asked for, else 0 (the base as it was) and every dense checkpoint.

    Raises:
        InputError: a step without a checkpoint, or of a pruned one.
    """
    dense = dense_steps(run)
    missing = [step for step in asked if step != 0 and step not in dense]
    if missing:
        raise InputError(
            f"{run.folder}: no dense checkpoint of step {missing[0]}; expected among 0, {_listed(dense)}; train "
            "with train.checkpoint_every and a larger train.keep"
        )
    return tuple(sorted(set(asked))) if asked else (0, *dense)


def run_adapters(run: Run, step: int) -> Adapters | None:
    """The adapters after `step` updates, float32, without the rest of the checkpoint; None at step 0.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    if step == 0:
        return None
    lora = run.config.lora
    names = dict.fromkeys(lora.targets)
    wanted = {"train": {"adapters": {"lora_a": names, "lora_b": names}}}
    tree = _restore_arrays(run, step, wanted)["train"]["adapters"]
    scale = lora_scale(lora.rank, lora.alpha, lora.rslora)
    return Adapters(
        lora_a={name: jnp.asarray(array) for name, array in tree["lora_a"].items()},
        lora_b={name: jnp.asarray(array) for name, array in tree["lora_b"].items()},
        scale=scale,
    )


def read_checkpoint(run: Run, step: int) -> Checkpoint:
    """The kind of the checkpoint after `step` updates.

    Raises:
        InputError: it cannot be read.
    """
    meta = _restore(run, step, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    events = int(_restore_arrays(run, step, {"prune": {"event": None}})["prune"]["event"])
    return Checkpoint(step, events, bool(meta["masked"]), bool(meta["base_moved"]))


def run_masks(run: Run, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The masks of a checkpoint, packed, uint8 `[L,O,ceil(I/8)]` (see `efx_jax.masks`); {} where there are none.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    if not checkpoint.masked:
        return {}
    return _restore_arrays(run, checkpoint.step, {"masks": dict.fromkeys(run.config.prune.targets)})["masks"]


def run_linears(run: Run, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The base linears `[L,O,I]` that the events have rewritten, in their own dtype; {} where they stand as they were.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    if not checkpoint.base_moved:
        return {}
    return _restore_arrays(run, checkpoint.step, {"layers": dict.fromkeys(LINEARS)})["layers"]


def load_export(run: Run) -> dict[str, Any]:
    """The stacked weights of what the run exported, name -> `[L,...]`, each in its own dtype.

    Raises:
        InputError: the run has not come to its end.
    """
    folder = run.folder / "export"
    if not (folder / "config.json").is_file():
        raise InputError(f"{run.folder}: holds no export; expected {folder}; let the run come to its end")
    return load_pretrained(folder, None)[0]["layers"]


def before_event(run: Run, params: Mapping[str, Any], spec: ModelSpec) -> tuple[int, Adapters]:
    """The latest step that no event has come before, and its adapters; at step 0 those that training begins with.

    Raises:
        InputError: a checkpoint cannot be read.
    """
    step = max((step for step in run.steps if not _pruned(run, step)), default=0)
    adapters = run_adapters(run, step)
    if adapters is None and run.config.lora.adapter:
        return step, load_adapter(run.config.lora.adapter, spec)
    if adapters is None:
        # As the run drew them: the first of three keys (efx_jax.training.loop).
        key = jax.random.split(jax.random.key(run.config.seed), 3)[0]
        lora = run.config.lora
        adapters = init_lora(key, params, spec, lora.rank, lora.alpha, lora.targets, lora.rslora)
    return step, adapters


def moved_and_masked(run: Run, step: int) -> tuple[bool, bool]:
    """Whether an event before the checkpoint has rewritten the base, and whether it holds masks.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    meta = _restore(run, step, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    return bool(meta["base_moved"]), bool(meta["masked"])


def load_base(run: Run) -> tuple[dict[str, Any], ModelSpec]:
    """The model that the run started from, each tensor in its own dtype."""
    return load_pretrained(run.config.model.path, None)


def training_rows(run: Run, spec: ModelSpec, rows: int, length: int) -> Batch:
    """Some of the run's training sequences as one right-padded batch, the longest first.

    Args:
        run: the run.
        spec: the model.
        rows: sequences drawn by the run's seed, all where there are fewer.
        length: most tokens of each.

    Returns:
        `tokens` int32 [B,T] and `lengths` int32 [B].

    Raises:
        InputError: the run's data cannot be read.
    """
    config = run.config
    tokenizer = load_tokenizer(config.model.path)
    data = load_data(config.data, config.seed, tokenizer, rows=1)
    sequences = tokenize(data.train, tokenizer, config.data.max_length, config.data.loss_on)
    length = min(length, spec.max_position_embeddings)
    room = rows * round_up(length, _MULTIPLE)
    batch = next(calibration_batches(sequences, config.seed, rows, length, room))
    filled = batch["lengths"] > 0
    return {"tokens": batch["tokens"][filled], "lengths": batch["lengths"][filled]}


def split_rows(batch: Batch) -> tuple[Batch, Batch]:
    """Two batches of every other row, which are about equally long.

    Raises:
        InputError: a single row.
    """
    if len(batch["lengths"]) < 2:
        raise InputError("the run's training rows: expected two or more, one of them held out, found one")
    return tuple({name: values[start::2] for name, values in batch.items()} for start in (0, 1))  # type: ignore[return-value]


def first_and_last(steps: Iterable[int]) -> list[int]:
    """The two ends of some steps, or the only one."""
    found = sorted(steps)
    return sorted({found[0], found[-1]})


def _steps(folder: Path) -> tuple[int, ...]:
    # A checkpoint that is not whole has a name with a suffix.
    names = [entry.name for entry in folder.glob("*") if (entry / "state").is_dir()]
    return tuple(sorted(int(name) for name in names if name.isdigit()))


def _pruned(run: Run, step: int) -> bool:
    return any(moved_and_masked(run, step))


def _restore_arrays(run: Run, step: int, wanted: Any) -> Any:
    """Some of a checkpoint's arrays, as NumPy's; `wanted` is their tree, with None in the place of each."""
    item = jax.tree.map(lambda _: np.zeros(0, np.float32), wanted, is_leaf=lambda leaf: leaf is None)
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
        partial_restore=True,
    )
    return _restore(run, step, "state", ocp.PyTreeCheckpointHandler(), arguments)


def _restore(run: Run, step: int, item: str, handler: Any, arguments: Any) -> Any:
    path = run.folder / run.kind / str(step) / item
    try:
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(path.absolute(), args=arguments)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: cannot be read as a checkpoint of this run: {reason}; train it again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns of parts that a reader leaves alone on purpose."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _listed(steps: tuple[int, ...]) -> str:
    return ", ".join(map(str, steps))
