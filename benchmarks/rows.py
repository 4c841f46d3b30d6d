"""Benchmark rows: one JSON object each, printed as it is measured and kept in a file under its name."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def row(name: str, value: float, unit: str, ratio: float | None, against: str, **details: Any) -> dict[str, Any]:
    """Builds and prints one result; `ratio` compares with what `against` names."""
    found = {"name": name, "value": round(value, 4), "unit": unit}
    if ratio is not None:
        found |= {"ratio": round(ratio, 4), "against": against}
    found |= details
    print(json.dumps(found), flush=True)
    return found


def keep(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows into the JSON file `path`, replacing rows of the same names; other rows and keys stay."""
    if not path:
        return
    file = Path(path)
    before = json.loads(file.read_text()) if file.exists() else {"rows": []}
    command = "python " + " ".join([sys.argv[0], *hide_paths(sys.argv[1:])])
    new = [{**found, "command": command} for found in rows]
    names = {found["name"] for found in new}
    record = {**before, "rows": [found for found in before["rows"] if found["name"] not in names] + new}
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, file)


def hide_paths(words: Sequence[str]) -> list[str]:
    """The command as someone else would type it: file names without this machine's folders."""
    return [Path(word).name if "/" in word and Path(word).exists() else word for word in words]


def interleaved(rivals: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of every rival in turn, A B A B ..., so that a disturbance hits all of them.

    The caller has run each once, so that nothing is compiled here.
    Processor seconds (all threads) distinguish a slow program from a busy machine.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            began, worked = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - began, time.process_time() - worked))
    return taken


def median(taken: Sequence[tuple[float, float]]) -> float:
    """The median of the wall seconds."""
    return statistics.median(wall for wall, _ in taken)


def spread(taken: Sequence[tuple[float, float]]) -> dict[str, float]:
    """What a row has beside the median: fastest and slowest, processor seconds and the number of repetitions."""
    walls = [wall for wall, _ in taken]
    processor = statistics.median(worked for _, worked in taken)
    return {
        "fastest": round(min(walls), 4),
        "slowest": round(max(walls), 4),
        "processor_seconds": round(processor, 4),
        "repeats": len(taken),
    }
