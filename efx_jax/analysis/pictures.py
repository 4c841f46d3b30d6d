"""Figures of records that have a layer and a matrix: by matrix kind, by layer, and as a heat map of both."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from efx_jax.analysis.plots import HeatMap, Series
from efx_jax.model.spec import LINEARS

Value = Callable[[Any], float | None]


def kinds(records: Iterable[Any]) -> list[str]:
    """The kinds of matrix among some records, in the model's order."""
    present = {each.matrix for each in records}
    return [name for name in LINEARS if name in present]


def layers(records: Iterable[Any]) -> list[int]:
    """The layers among some records, ascending."""
    return sorted({each.layer for each in records})


def layer_map(records: Sequence[Any], value: Value, title: str, value_label: str) -> HeatMap:
    """A row per kind of matrix, a column per layer; several records of one place are averaged."""
    rows, columns = kinds(records), layers(records)
    return HeatMap(
        title=title,
        x_label="layer",
        y_label="",
        value_label=value_label,
        rows=tuple(rows),
        columns=tuple(map(str, columns)),
        values=tuple(
            tuple(
                mean(value(each) for each in records if (each.matrix, each.layer) == (row, column))
                for column in columns
            )
            for row in rows
        ),
    )


def kind_series(records: Sequence[Any], value: Value, label: str, ends: bool = False) -> Series:
    """The mean over layers of each kind of matrix; with `ends`, the error bars show the lowest and highest layer."""
    by_kind = {kind: _present(value(each) for each in records if each.matrix == kind) for kind in kinds(records)}
    found = [(kind, values) for kind, values in by_kind.items() if values]
    return Series(
        label,
        tuple(kind for kind, _ in found),
        tuple(sum(values) / len(values) for _, values in found),
        tuple(min(values) for _, values in found) if ends else None,
        tuple(max(values) for _, values in found) if ends else None,
    )


def layer_series(records: Sequence[Any], value: Value, label: str) -> Series:
    """The mean over all matrices of each layer."""
    found = [(layer, mean(value(each) for each in records if each.layer == layer)) for layer in layers(records)]
    return Series(
        label,
        tuple(layer for layer, value in found if value is not None),
        tuple(value for _, value in found if value is not None),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None."""
    found = _present(values)
    return sum(found) / len(found) if found else None


def percent(share: float | None) -> float | None:
    """A share in percent."""
    return None if share is None else 100 * share


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
