"""Which settings of the pruning make sense, and which exclude each other."""

import itertools
from collections.abc import Iterable
from typing import Any, get_args

from efx_jax.config import Budget, GradientLabels, MaskForward, PruneConfig, Recovery, Score, TrainConfig
from efx_jax.config_event import ACROSS_ROWS, n_of_m
from efx_jax.errors import InputError
from efx_jax.rounding import round_up

Rule = tuple[str, object, bool, str]
"""Setting, value found, whether it is valid, what was expected."""


def validate_prune(prune: PruneConfig) -> None:
    """Refuses meaningless values in a hand-made `PruneConfig`: `Literal` is not checked at run time.

    Raises:
        InputError: the first unknown name, number out of range, or setting that another one excludes.
    """
    expected = "a score of entries: atp learns in the course of a run (train.py) which units go"
    by_entry = ("prune.score", prune.score, prune.score != "atp", expected)
    refuse([*_choice_rules(prune), by_entry, *_range_rules(prune), *_pair_rules(prune)])


def refuse(rules: Iterable[Rule]) -> None:
    """Refuses the first setting whose value is not valid.

    Raises:
        InputError: what it must be, and what it is.
    """
    for setting, found, is_right, expected in rules:
        if not is_right:
            raise InputError(f"{setting} must be {expected}, found {found!r}")


def prune_rules(prune: PruneConfig, train: TrainConfig) -> Iterable[Rule]:
    """Every rule of a run's pruning."""
    return [
        *_range_rules(prune),
        *_pair_rules(prune),
        *_calibration_rules(prune),
        *_schedule_rules(prune, train),
    ]


def _choice_rules(prune: PruneConfig) -> Iterable[Rule]:
    found: list[tuple[str, str, Any]] = [
        ("score", prune.score, Score),
        ("recovery", prune.recovery, Recovery),
        ("budget", prune.budget, Budget),
        ("mask_forward", prune.mask_forward, MaskForward),
        ("gradient_labels", prune.gradient_labels, GradientLabels),
    ]
    return [
        (f"prune.{name}", value, value in get_args(kind), f"one of {', '.join(get_args(kind))}")
        for name, value, kind in found
    ]


def _pair_rules(prune: PruneConfig) -> Iterable[Rule]:
    """What no event can do, whatever the model."""
    shares = (
        "prune.ema",
        prune.ema,
        prune.ema == 1 or prune.budget != "global",
        "1 with prune.budget global, whose shares come of the scores of one event",
    )
    return [*_sweep_rules(prune), *_recovery_rules(prune), *_pattern_rules(prune), shares]


def _sweep_rules(prune: PruneConfig) -> Iterable[Rule]:
    """Settings that SparseGPT's sweep dictates, since it scores an entry after its row has moved."""
    if prune.score != "sparsegpt":
        return []
    return [
        ("prune.ema", prune.ema, prune.ema == 1, "1 with prune.score sparsegpt, whose scores of events do not compare"),
        (
            "prune.group",
            prune.group,
            prune.group not in ("slab", "bounded"),
            "row, matrix or N:M with prune.score sparsegpt, which takes them within slabs of columns",
        ),
        (
            "prune.swaps",
            prune.swaps,
            prune.swaps == 0 or prune.recovery != "obs",
            "0 with prune.score sparsegpt and prune.recovery obs: the weights were updated for the sweep's own mask",
        ),
        (
            "prune.budget",
            prune.budget,
            prune.budget != "global",
            "uniform or owl with prune.score sparsegpt, which scores an entry after its budget is set",
        ),
    ]


def _recovery_rules(prune: PruneConfig) -> Iterable[Rule]:
    has_target = prune.recovery in ("gram_pbs", "admm", "obs")
    refines = prune.recovery == "admm" and prune.admm_refine > 0
    return [
        (
            "prune.pbs_rounds",
            prune.pbs_rounds,
            prune.pbs_rounds == 0 or prune.recovery == "gram_pbs",
            f"0 with prune.recovery {prune.recovery}: only gram_pbs refits A",
        ),
        (
            "prune.mask_forward",
            prune.mask_forward,
            prune.pbs_rounds == 0 or prune.mask_forward != "frozen",
            "another than frozen with prune.pbs_rounds: no fit holds for what frozen computes at pruned entries",
        ),
        (
            "prune.dense_path",
            prune.dense_path,
            prune.dense_path == 0 or (prune.sequential and has_target),
            "0 without prune.sequential and a recovery with a target (gram_pbs, admm or obs)",
        ),
        (
            "prune.swaps",
            prune.swaps,
            prune.swaps == 0 or not refines,
            "0 with prune.admm_refine, whose first step chooses the entries of every row anew",
        ),
        (
            "prune.group",
            prune.group,
            prune.group != "slab" or (prune.swaps == 0 and not refines),
            "another than slab with prune.swaps or prune.admm_refine, which keep the counts of rows, not of slabs",
        ),
    ]


def _pattern_rules(prune: PruneConfig) -> Iterable[Rule]:
    has_pattern = n_of_m(prune.group) is not None
    return [
        (
            "prune.permute",
            prune.permute,
            not prune.permute or (has_pattern and prune.recovery in ("admm", "obs")),
            "false without prune.group N:M, where places matter, and prune.recovery admm or obs, which write weights",
        ),
        (
            "prune.permute",
            prune.permute,
            not prune.permute or bool({"o_proj", "down_proj"} & set(prune.targets)),
            "false without o_proj or down_proj in prune.targets, whose inputs are what changes places",
        ),
        (
            "prune.budget",
            prune.budget,
            prune.budget == "uniform" or not has_pattern,
            f"uniform with prune.group {prune.group}, which has one sparsity only",
        ),
    ]


def epochs_begun(train: TrainConfig) -> int:
    """Epochs of a run, at least one; the last may be a part of one."""
    return max(1, round_up(train.epochs))


def events_asked(prune: PruneConfig, train: TrainConfig) -> int:
    """Events of the schedule; those that fall on the same update are one event."""
    return {"epochs": epochs_begun(train), "fractions": len(prune.fractions), "cubic": prune.events}[prune.schedule]


def target_rule(setting: str, targets: tuple[str, ...], may_be_empty: bool = False) -> Rule:
    """The rule for names of linears, each given once."""
    # The defaults are all seven linears of a block.
    known = PruneConfig().targets
    are_different = len(set(targets)) == len(targets)
    is_right = (len(targets) > 0 or may_be_empty) and are_different and set(targets) <= set(known)
    return setting, " ".join(targets), is_right, f"different names among {', '.join(known)}"


def _range_rules(prune: PruneConfig) -> Iterable[Rule]:
    pattern = n_of_m(prune.group)
    is_group = prune.group in ("row", *ACROSS_ROWS) or pattern is not None
    rules: list[Rule] = [
        ("prune.sparsity", prune.sparsity, 0 <= prune.sparsity < 1, "in [0, 1)"),
        ("prune.group", prune.group, is_group, "row, matrix, slab, bounded, or N:M with N < M such as 2:4"),
        ("prune.bound", prune.bound, 0 <= prune.bound <= 1, "in [0, 1]"),
        ("prune.budget_spread", prune.budget_spread, 0 <= prune.budget_spread <= 1, "in [0, 1]"),
        ("prune.owl_lambda", prune.owl_lambda, prune.owl_lambda >= 0, "at least 0"),
        ("prune.owl_multiple", prune.owl_multiple, prune.owl_multiple > 0, "above 0"),
        ("prune.ria_power", prune.ria_power, prune.ria_power >= 0, "at least 0"),
        target_rule("prune.targets", prune.targets),
        target_rule("prune.row_targets", prune.row_targets, may_be_empty=True),
        ("prune.ema", prune.ema, 0 < prune.ema <= 1, "in (0, 1]"),
        ("prune.swaps", prune.swaps, prune.swaps >= 0, "at least 0"),
        ("prune.dense_path", prune.dense_path, 0 <= prune.dense_path <= 1, "in [0, 1]"),
        ("prune.ridge", prune.ridge, prune.ridge >= 0, "at least 0"),
        ("prune.pbs_rounds", prune.pbs_rounds, prune.pbs_rounds >= 0, "at least 0"),
        ("prune.admm_steps", prune.admm_steps, prune.admm_steps >= 1, "at least 1"),
        ("prune.admm_refine", prune.admm_refine, 0 <= prune.admm_refine < prune.admm_steps, "from 0 to admm_steps - 1"),
        ("prune.reach_shrink", prune.reach_shrink, 0 <= prune.reach_shrink <= 1, "in [0, 1]"),
        ("prune.admm_damping", prune.admm_damping, prune.admm_damping >= 0, "at least 0"),
    ]
    if pattern:
        kept, block = pattern
        share = 1 - kept / block
        is_share = prune.sparsity == 0 or abs(prune.sparsity - share) <= 1e-6
        expected = f"1 - {kept}/{block} = {share:g} with prune.group {prune.group}, or 0"
        rules.append(("prune.sparsity", prune.sparsity, is_share, expected))
        expected = "epochs or fractions with prune.group N:M, which has one sparsity only"
        rules.append(("prune.schedule", prune.schedule, prune.schedule != "cubic", expected))
    return rules


def _calibration_rules(prune: PruneConfig) -> Iterable[Rule]:
    return [
        (
            "prune.calibration",
            " ".join(prune.calibration),
            len(prune.calibration) > 0
            and all(prune.calibration)
            and len(set(prune.calibration)) == len(prune.calibration),
            "train, files or names, each once",
        ),
        (
            "prune.calibration_rows",
            prune.calibration_rows,
            prune.calibration_rows >= max(1, len(prune.calibration)),
            f"at least {max(1, len(prune.calibration))}, a row of each of prune.calibration",
        ),
        ("prune.survey_share", prune.survey_share, 0 < prune.survey_share <= 1, "above 0 and at most 1"),
        ("prune.calibration_length", prune.calibration_length, prune.calibration_length >= 1, "at least 1"),
        ("prune.calibration_tokens", prune.calibration_tokens, prune.calibration_tokens >= 1, "at least 1"),
        ("prune.gradient_batches", prune.gradient_batches, prune.gradient_batches >= 1, "at least 1"),
        ("prune.domain_steps", prune.domain_steps, prune.domain_steps >= 0, "at least 0"),
        ("prune.domain_learning_rate", prune.domain_learning_rate, prune.domain_learning_rate > 0, "above 0"),
        ("prune.domain_loss_scale", prune.domain_loss_scale, prune.domain_loss_scale > 0, "above 0"),
        ("prune.general_weight", prune.general_weight, prune.general_weight >= 0, "at least 0"),
        ("prune.chunk_mib", prune.chunk_mib, prune.chunk_mib >= 1, "at least 1"),
    ]


def _schedule_rules(prune: PruneConfig, train: TrainConfig) -> Iterable[Rule]:
    times, (start, end) = prune.fractions, prune.ramp
    is_increasing = all(early < late for early, late in itertools.pairwise(times))
    are_shares = len(times) > 0 and all(0 <= time <= 1 for time in times)
    is_single = prune.sparsity > 0 and events_asked(prune, train) == 1
    ends = {"epochs": True, "fractions": times[-1:] == (1,), "cubic": end == 1}
    ends_pruned = ends[prune.schedule] or train.epochs == 0
    is_made_up_for = prune.recovery in ("pbs", "gram_pbs") and not prune.merge_each_event
    return [
        ("prune.fractions", times, are_shares and is_increasing, "increasing shares in [0, 1]"),
        ("prune.events", prune.events, prune.events >= 1, "at least 1"),
        ("prune.ramp", prune.ramp, 0 <= start < end <= 1, "two increasing shares in [0, 1]"),
        (
            "prune.mask_forward",
            prune.mask_forward,
            prune.mask_forward != "dense" or prune.sparsity == 0 or ends_pruned,
            "exact, ste or frozen with the last event before the end: the training after it would never see its mask",
        ),
        (
            "prune.mask_forward",
            prune.mask_forward,
            prune.sparsity == 0
            or prune.mask_forward in ("exact", "ste")
            or not is_made_up_for
            or (is_single and ends_pruned),
            f"exact or ste with prune.recovery {prune.recovery}, whose adapters fit under the mask alone; or set "
            "prune.merge_each_event",
        ),
        (
            "prune.plain_last_event",
            prune.plain_last_event,
            not (is_single and prune.plain_last_event and prune.recovery != "none"),
            f"false with a single event, or prune.recovery {prune.recovery} would never run",
        ),
    ]
