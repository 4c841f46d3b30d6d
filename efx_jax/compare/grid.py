"""The cells of a comparison: methods on their schedules, for all values and seeds, each with the name of its run."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from efx_jax.analysis.wording import setting_value
from efx_jax.compare.settings import Comparison, Settings
from efx_jax.config import Config, DistillConfig
from efx_jax.config_effects import idle_settings
from efx_jax.config_rules import validate
from efx_jax.config_values import nearest, replace_values, setting_types
from efx_jax.errors import InputError
from efx_jax.training.start import FREE_SECTIONS, unpruned

# Sections that say nothing of a run that prunes nothing.
_METHOD_SECTIONS = ("prune", "atp", "distill")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        method: its name.
        schedule: its name, "" for a method that prunes nothing.
        axes: the values of the comparison's axes, in their order; None where a value has no effect.
        seed: the run's seed.
        config: the settings.
        run: the name of the run's folder, which cells with equal settings share.
        reference: the folder name of the run that Rel.% refers to, or "".
        refusal: why the settings cannot be run, or "".
    """

    method: str
    schedule: str
    axes: tuple[Any, ...]
    seed: int
    config: Config
    run: str
    reference: str
    refusal: str

    @property
    def title(self) -> str:
        """The cell in one line."""
        values = [axis_text(value) for value in self.axes if value is not None]
        return ", ".join([f"{self.method}/{self.schedule}".rstrip("/"), *values, f"seed {self.seed}"])


def list_cells(comparison: Comparison) -> list[Cell]:
    """All cells, seed after seed; cells that differ only in axis values without effect are merged.

    Raises:
        InputError: every cell is refused.
    """
    cells: dict[tuple[Any, ...], Cell] = {}
    for seed, values in itertools.product(comparison.seeds, itertools.product(*comparison.axes.values())):
        varied = dict(zip(comparison.axes, values, strict=True))
        for method, schedules in comparison.runs.items():
            for schedule in schedules or ("",):
                cell = _cell(comparison, method, schedule, varied, seed)
                cells.setdefault((seed, cell.axes, method, schedule), cell)
    found = list(cells.values())
    if all(cell.refusal for cell in found):
        raise InputError(f"{comparison.name}: no run is possible; {found[0].title}: {found[0].refusal}")
    return found


def choose_cells(cells: Sequence[Cell], names: Iterable[str]) -> list[Cell]:
    """The cells with these methods, schedules or METHOD/SCHEDULE pairs; without names, all cells.

    Raises:
        InputError: a name that matches no cell.
    """
    chosen = set(names)
    own = {cell: {cell.method, cell.schedule, f"{cell.method}/{cell.schedule}"} - {""} for cell in cells}
    known = set().union(*own.values())
    for name in sorted(chosen - known):
        hint = f"the nearest is {nearest(name, sorted(known))}"
        raise InputError(f"--only {name}: expected a method, a schedule or METHOD/SCHEDULE; {hint}")
    return [cell for cell in cells if not chosen or chosen & own[cell]]


def axis_text(value: Any) -> str:
    """A setting's value for a table."""
    if isinstance(value, tuple):
        return " ".join(axis_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_name(config: Config) -> str:
    """A short description of a run, and eight hex digits that identify its settings.

    Only settings that differ from their default count, so that adding a setting does not rename old runs; settings
    about where a run is computed never count.
    """
    default = Config()
    values = {key: setting_value(config, key) for key in setting_types() if key.partition(".")[0] not in FREE_SECTIONS}
    told = sorted((key, value) for key, value in values.items() if value != setting_value(default, key))
    method = f"{config.prune.score}-{config.prune.sparsity:g}" if config.prune.sparsity else "dense"
    return f"{PurePath(config.data.train).stem}-{method}-seed{config.seed}-{short_hash(told)}"


def short_hash(value: Any) -> str:
    """Eight hex digits of a hash of the value's repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def _cell(comparison: Comparison, method: str, schedule: str, varied: Settings, seed: int) -> Cell:
    config = _resolve(comparison, method, schedule, varied, seed)
    reference = _reference(comparison, method, schedule, varied, seed)
    shown = tuple(setting_value(config, key) if _has_say(config, key) else None for key in varied)
    refusal = ""
    try:
        validate(config)
    except InputError as error:
        refusal = str(error)
    return Cell(method, schedule, shown, seed, config, run_name(config), reference, refusal)


def _reference(comparison: Comparison, method: str, schedule: str, varied: Settings, seed: int) -> str:
    """The dense run of the cell's seed and values of the axes, "" where no cell of the grid is that run.

    A method may fix the value of an axis, such as a rank of its own: the dense run has that value too.
    """
    if not comparison.reference:
        return ""
    fixed = {**comparison.methods[method], **comparison.schedules.get(schedule, {})}
    own = {key: fixed[key] for key in varied.keys() & fixed.keys() if key.partition(".")[0] not in _METHOD_SECTIONS}
    if any(value not in comparison.axes[key] for key, value in own.items()):
        return ""
    return run_name(_resolve(comparison, comparison.reference, "", {**varied, **own}, seed))


def _resolve(comparison: Comparison, method: str, schedule: str, varied: Settings, seed: int) -> Config:
    values = {**varied, **comparison.methods[method], **comparison.schedules.get(schedule, {}), "seed": seed}
    config = replace_values(comparison.base, values)
    # Without a teacher the settings of distillation, which the base's preset may bring, have no effect.
    if not config.distill.teacher:
        config = dataclasses.replace(config, distill=DistillConfig())
    idle = idle_settings(config).keys() & varied.keys()
    config = replace_values(config, {key: setting_value(Config(), key) for key in idle})
    # If nothing is pruned, the other pruning settings have no effect: they all give the same run.
    return config if config.prune.sparsity else unpruned(config)


def _has_say(config: Config, key: str) -> bool:
    """Whether a setting can matter to a run, as `_resolve` leaves it."""
    section = key.partition(".")[0]
    if not config.prune.sparsity:
        return section not in _METHOD_SECTIONS
    if section == "distill" and not config.distill.teacher:
        return key == "distill.teacher"
    return key not in idle_settings(config)
