"""Every row of a comparison against dense LoRA and against the best other row, on the same windows of text."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from efx_jax.compare.paired import Windows, perplexity_ratio, ratio_value
from efx_jax.compare.rows import Row
from efx_jax.compare.settings import Comparison
from efx_jax.config_event import n_of_m
from efx_jax.evaluation.scores import Interval


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A perplexity divided by that of the row `other`, with the ratio's 95 % interval, see `perplexity_ratio`."""

    value: float
    interval: Interval | None
    other: str

    @property
    def text(self) -> str:
        ends = "" if self.interval is None else f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"
        return f"{self.value:.3f}{ends} of {self.other}"


def ratios(comparison: Comparison, rows: Sequence[Row]) -> list[dict[str, Ratio]]:
    """For each row, the ratios that can be formed: "TEXT over dense" and "TEXT over the best other".

    Args:
        comparison: names the texts and the reference.
        rows: the rows of the table.
    """
    return [
        {
            f"{text} over {what}": ratio
            for text in comparison.texts
            for what, other in (
                (comparison.reference, _reference(comparison, row, rows)),
                ("the best other", _best_other(text, row, rows)),
            )
            if other is not None and (ratio := _ratio(text, row, other)) is not None
        }
        for row in rows
    ]


def _reference(comparison: Comparison, row: Row, rows: Sequence[Row]) -> Row | None:
    """The row of the dense runs that this row's cells refer to."""
    wanted = {record.cell.reference for record in row.records} - {""}
    found = (each for each in rows if wanted & {record.cell.run for record in each.records})
    return next((each for each in found if each is not row and each.method == comparison.reference), None)


def _best_other(text: str, row: Row, rows: Sequence[Row]) -> Row | None:
    """The other pruned row with the same sparsity, pattern and axes that has the lowest perplexity; an axis without
    effect on one of two rows is ignored. Each is compared on the seeds that it shares with this row, since an
    unfinished grid may have only the easiest seeds of another row."""
    own = _windows(text, row)
    rivals = [each for each in rows if each is not row and each.asked > 0 and _are_rivals(each, row)]
    values = {number: ratio_value(own, _windows(text, each)) for number, each in enumerate(rivals)}
    finite = {number: value for number, value in values.items() if value is not None}
    return rivals[max(finite, key=lambda number: finite[number])] if finite else None


def _are_rivals(one: Row, other: Row) -> bool:
    apart = [pair for pair in zip(one.axes, other.axes, strict=True) if None not in pair and pair[0] != pair[1]]
    return not apart and _kind(one) == _kind(other)


def _kind(row: Row) -> tuple[Any, ...]:
    """What two rows must have in common to be rivals, apart from the axes."""
    return row.asked, n_of_m(row.records[0].cell.config.prune.group)


def _ratio(text: str, row: Row, other: Row) -> Ratio | None:
    found = perplexity_ratio(_windows(text, row), _windows(text, other))
    name = f"{other.method}/{other.schedule}" if other.schedule else other.method
    return None if found is None else Ratio(*found, name)


def _windows(text: str, row: Row) -> Mapping[int, Windows]:
    return {record.cell.seed: record.windows[text] for record in row.records if text in record.windows}
