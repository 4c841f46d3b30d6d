"""Pairs of runs, by what differs between them: the task within a domain, or the domain (the paper's figure 3d)."""

import itertools
from collections.abc import Sequence

from efx_jax.analysis.runs import Run
from efx_jax.data.mixes import find_mix
from efx_jax.errors import InputError

DOMAINS = {
    "health": ("pubmedqa", "mednli", "hqs", "evidence_inference"),
    "legal": ("casehold", "casehold_lexglue", "contract_nli", "billsum"),
}
"""Domain -> the paper's tasks in it and their stand-ins."""

_OTHER_SEED = ", other seed"
SHIFTS = tuple(what + seed for seed in ("", _OTHER_SEED) for what in ("same data", "other task", "other domain"))
"""What may change between two runs."""


def run_domain(run: Run) -> str:
    """The domain of a run's training rows: that of its task, or of all tasks of its mix.

    Raises:
        InputError: the rows are not of a known task, or are of tasks from several domains.
    """
    source = run.config.data.train
    if source == "icd10":
        return "health"
    mix = find_mix(source)
    tasks = [part.name for part in mix.parts] if mix else []
    found = {next((name for name, known in DOMAINS.items() if task in known), "") for task in tasks}
    if len(found) != 1 or "" in found:
        raise InputError(
            f"{run.folder}: data.train {source} has no domain that is known ({', '.join(DOMAINS)}); name one for every "
            "run with --domains"
        )
    return found.pop()


def run_domains(runs: Sequence[Run], named: Sequence[str]) -> tuple[str, ...]:
    """The domain of every run: as `named`, else from its data.

    Raises:
        InputError: not exactly one name per run, or data without a known domain.
    """
    if named and len(named) != len(runs):
        raise InputError(f"--domains: expected one for each of {len(runs)} runs, found {len(named)}")
    return tuple(named) if named else tuple(run_domain(run) for run in runs)


def shift_of(first: tuple[str, str, int], second: tuple[str, str, int]) -> str:
    """What changes between two runs, each a (domain, data, seed): one of `SHIFTS`.

    Runs on the same data differ only in seed or settings and show what these alone do to a distance. Of two mixes or
    tasks in one domain, one may contain rows of the other. Runs with the same seed start from the same A, which brings
    their adapters closer whatever they learn, so they are kept separate from pairs with different seeds.
    """
    what = "other domain" if first[0] != second[0] else "same data" if first[1] == second[1] else "other task"
    return what if first[2] == second[2] else what + _OTHER_SEED


def pairs_of(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """The positions of each pair of runs.

    Raises:
        InputError: a single run.
    """
    if len(runs) < 2:
        raise InputError("RUN: expected two runs or more to compare, found one")
    return list(itertools.combinations(range(len(runs)), 2))
