"""What a run has measured so far; saved with every checkpoint."""

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from efx_jax.training.validation import Best


@dataclasses.dataclass
class Journal:
    """Measurements by model, seconds by phase, real tokens trained on, and the best model so far (`eval.best`).

    `memory`: a session's peak memory up to the end of each phase, in MiB. `sparsity`: that of the masks in force.
    """

    results: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    tokens: int
    best: Best | None = None
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    sparsity: float = 0.0

    @contextlib.contextmanager
    def phase(self, name: str, show: Callable[[str], object] | None = None) -> Iterator[None]:
        """Adds the time of a block to the phase's seconds; `show`, from a progress bar, displays its name meanwhile."""
        start = time.perf_counter()
        if show:
            show(name)
        try:
            yield
        finally:
            if show:
                show("train")
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.memory[name] = max(self.memory.get(name, 0.0), peak_memory_mib())

    def announced(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A phase without a bar, announced by a line on stderr, as it would otherwise be silent for minutes."""
        if jax.process_index() == 0:
            print(f"{name} ...", file=sys.stderr)
        return self.phase(name)

    def take_up(self, notes: dict[str, Any]) -> None:
        """Resumes from what an earlier session saved; seconds and tokens continue from there."""
        self.results.update(notes["results"])
        self.tokens = notes["tokens"]
        self.best = Best(**notes["best"]) if notes["best"] else None
        for name, seconds in notes["seconds"].items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for name, peak in notes["memory"].items():
            self.memory[name] = max(self.memory.get(name, 0.0), peak)


def peak_memory_mib() -> float:
    """The device's peak memory if it reports one, else the process's largest resident set."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
