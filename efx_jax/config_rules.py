"""Which values of the settings make sense, and which settings exclude each other."""

import itertools
import re
from collections.abc import Iterable
from typing import Any, get_args

from efx_jax.config import (
    Budget,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MaskForward,
    MeshConfig,
    ProfileConfig,
    PruneConfig,
    Recovery,
    Score,
    TrainConfig,
)
from efx_jax.errors import InputError

Rule = tuple[str, object, bool, str]
"""Setting, value found, whether it is right, what was expected."""

_BY_HAND = "set together with mesh.coordinator: processes at least 1, process from 0 to processes - 1"


def validate(config: Config) -> None:
    """Refuses settings that cannot be run, before anything is loaded.

    Raises:
        InputError: the first setting whose value is out of range or excluded by another.
    """
    rules = [
        ("model.path", config.model.path, config.model.path != "", 'a path, a Hub name or "quickstart"'),
        *_data_rules(config.data),
        *_lora_rules(config.lora),
        _adapted_rule(config),
        *_prune_rules(config.prune),
        *_pair_rules(config.prune),
        *_calibration_rules(config.prune),
        *_schedule_rules(config.prune, config.train),
        *_train_rules(config.train),
        *_eval_rules(config.eval),
        *_untrained_rules(config),
        *_mesh_rules(config.mesh),
        *_profile_rules(config.profile),
        ("seed", config.seed, 0 <= config.seed < 2**32, "in [0, 2^32)"),
    ]
    _refuse(rules)


def _refuse(rules: Iterable[Rule]) -> None:
    for setting, found, is_right, expected in rules:
        if not is_right:
            raise InputError(f"{setting} must be {expected}, found {found!r}")


def validate_prune(prune: PruneConfig) -> None:
    """Refuses names in a hand-made `PruneConfig` that mean nothing: `Literal` is no check at run time.

    Raises:
        InputError: the first unknown name, or the first setting that another one excludes.
    """
    _refuse([*_choice_rules(prune), _target_rule("prune.targets", prune.targets), *_pair_rules(prune)])


def _choice_rules(prune: PruneConfig) -> Iterable[Rule]:
    found: list[tuple[str, str, Any]] = [
        ("score", prune.score, Score),
        ("recovery", prune.recovery, Recovery),
        ("budget", prune.budget, Budget),
        ("mask_forward", prune.mask_forward, MaskForward),
    ]
    return [
        (f"prune.{name}", value, value in get_args(kind), f"one of {', '.join(get_args(kind))}")
        for name, value, kind in found
    ]


def _pair_rules(prune: PruneConfig) -> Iterable[Rule]:
    """What no event can do, whatever the model."""
    sweeps = prune.score == "sparsegpt"
    return [
        (
            "prune.ema",
            prune.ema,
            not sweeps or prune.ema == 1,
            "1 with prune.score sparsegpt: an entry is scored after its row has moved, so that events do not compare",
        ),
        (
            "prune.group",
            prune.group,
            not sweeps or prune.group not in ("slab", "bounded"),
            "row, matrix or N:M with prune.score sparsegpt, which takes them within slabs of columns",
        ),
        (
            "prune.budget",
            prune.budget,
            prune.budget == "uniform" or n_of_m(prune.group) is None,
            f"uniform with prune.group {prune.group}, which has one sparsity only",
        ),
    ]


def n_of_m(group: str) -> tuple[int, int] | None:
    """N and M of a comparison group "N:M" (N of M consecutive inputs stay), None for any other text."""
    match = re.fullmatch(r"(\d+):(\d+)", group)
    if not match:
        return None
    kept, block = int(match[1]), int(match[2])
    return (kept, block) if 1 <= kept < block else None


def _data_rules(data: DataConfig) -> Iterable[Rule]:
    return [
        ("data.train", data.train, data.train != "", "a file, a Hub name or a built-in task"),
        ("data.max_length", data.max_length, data.max_length >= 2, "at least 2"),
        ("data.new_tokens", data.new_tokens, data.new_tokens >= 0, "at least 0"),
        ("data.holdout", data.holdout, 0 <= data.holdout < 1, "in [0, 1)"),
    ]


def _lora_rules(lora: LoraConfig) -> Iterable[Rule]:
    return [
        ("lora.rank", lora.rank, lora.rank >= 1, "at least 1"),
        ("lora.alpha", lora.alpha, lora.alpha > 0, "above 0"),
        ("lora.dropout", lora.dropout, 0 <= lora.dropout < 1, "in [0, 1)"),
        _target_rule("lora.targets", lora.targets),
    ]


def _adapted_rule(config: Config) -> Rule:
    prune, adapted = config.prune, config.lora.targets
    is_right = prune.score != "lora_gradient" or set(prune.targets) <= set(adapted)
    expected = f"among lora.targets ({', '.join(adapted)}) with prune.score lora_gradient, which reads their gradients"
    return "prune.targets", " ".join(prune.targets), is_right, expected


def _target_rule(setting: str, targets: tuple[str, ...], may_be_empty: bool = False) -> Rule:
    # The defaults are all seven linears of a block.
    known = PruneConfig().targets
    are_different = len(set(targets)) == len(targets)
    is_right = (len(targets) > 0 or may_be_empty) and are_different and set(targets) <= set(known)
    return setting, " ".join(targets), is_right, f"different names among {', '.join(known)}"


def _prune_rules(prune: PruneConfig) -> Iterable[Rule]:
    pattern = n_of_m(prune.group)
    is_group = prune.group in ("row", "matrix", "slab", "bounded") or pattern is not None
    rules: list[Rule] = [
        ("prune.sparsity", prune.sparsity, 0 <= prune.sparsity < 1, "in [0, 1)"),
        ("prune.group", prune.group, is_group, "row, matrix, slab, bounded, or N:M with N < M such as 2:4"),
        ("prune.bound", prune.bound, 0 <= prune.bound <= 1, "in [0, 1]"),
        ("prune.owl_lambda", prune.owl_lambda, prune.owl_lambda >= 0, "at least 0"),
        ("prune.owl_multiple", prune.owl_multiple, prune.owl_multiple > 0, "above 0"),
        ("prune.ria_power", prune.ria_power, prune.ria_power >= 0, "at least 0"),
        _target_rule("prune.targets", prune.targets),
        _target_rule("prune.row_targets", prune.row_targets, may_be_empty=True),
        ("prune.ema", prune.ema, 0 < prune.ema <= 1, "in (0, 1]"),
        ("prune.ridge", prune.ridge, prune.ridge >= 0, "at least 0"),
        ("prune.admm_steps", prune.admm_steps, prune.admm_steps >= 1, "at least 1"),
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
        ("prune.calibration", prune.calibration, prune.calibration != "", "train, a file or a name"),
        ("prune.calibration_rows", prune.calibration_rows, prune.calibration_rows >= 1, "at least 1"),
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
    by_schedule = {"epochs": max(1, round(train.epochs)), "fractions": len(times), "cubic": prune.events}
    is_single = prune.sparsity > 0 and by_schedule[prune.schedule] == 1
    prunes_first = is_single and prune.schedule == "fractions" and times == (0,)
    return [
        ("prune.fractions", times, are_shares and is_increasing, "increasing shares in [0, 1]"),
        ("prune.events", prune.events, prune.events >= 1, "at least 1"),
        ("prune.ramp", prune.ramp, 0 <= start < end <= 1, "two increasing shares in [0, 1]"),
        (
            "prune.mask_forward",
            prune.mask_forward,
            not (prunes_first and prune.mask_forward == "dense"),
            "exact, ste or frozen with the only event at 0: training would never see the mask that it starts from",
        ),
        (
            "prune.plain_last_event",
            prune.plain_last_event,
            not (is_single and prune.plain_last_event and prune.recovery != "none"),
            f"false with a single event, or prune.recovery {prune.recovery} would never run",
        ),
    ]


def _train_rules(train: TrainConfig) -> Iterable[Rule]:
    micro = train.micro_batch or train.batch_size
    return [
        (
            "train.epochs",
            train.epochs,
            train.epochs > 0 or (train.epochs == 0 and train.steps == 0),
            "above 0, or 0 with train.steps 0 to train nothing",
        ),
        ("train.steps", train.steps, train.steps >= 0, "at least 0"),
        ("train.micro_batch", train.micro_batch, train.micro_batch >= 0, "at least 0"),
        ("train.batch_size", train.batch_size, 1 <= train.batch_size <= 2**20, "in [1, 2^20]"),
        (
            "train.batch_size",
            train.batch_size,
            micro > 0 and train.batch_size % micro == 0,
            f"a multiple of train.micro_batch {micro}",
        ),
        ("train.micro_tokens", train.micro_tokens, train.micro_tokens >= 0, "at least 0"),
        ("train.learning_rate", train.learning_rate, train.learning_rate > 0, "above 0"),
        ("train.warmup", train.warmup, 0 <= train.warmup < 1, "in [0, 1)"),
        ("train.weight_decay", train.weight_decay, train.weight_decay >= 0, "at least 0"),
        ("train.clip", train.clip, train.clip >= 0, "at least 0"),
        ("train.log_every", train.log_every, train.log_every >= 1, "at least 1"),
        ("train.checkpoint_every", train.checkpoint_every, train.checkpoint_every >= 0, "at least 0"),
        ("train.keep", train.keep, train.keep >= 1, "at least 1"),
    ]


def _eval_rules(evaluation: EvalConfig) -> Iterable[Rule]:
    return [
        ("eval.rows", evaluation.rows, evaluation.rows >= 0, "at least 0"),
        ("eval.text_tokens", evaluation.text_tokens, evaluation.text_tokens >= 0, "at least 0"),
        ("eval.window", evaluation.window, evaluation.window >= 2, "at least 2"),
        ("eval.batch_size", evaluation.batch_size, evaluation.batch_size >= 1, "at least 1"),
        ("eval.runs", evaluation.runs, evaluation.runs >= 1, "at least 1"),
        ("eval.every", evaluation.every, evaluation.every >= 0, "at least 0"),
        ("eval.every_epochs", evaluation.every_epochs, evaluation.every_epochs >= 0, "at least 0"),
        (
            "eval.every",
            evaluation.every,
            not (evaluation.every and evaluation.every_epochs),
            "0 with eval.every_epochs: one of the two",
        ),
        (
            "eval.best",
            evaluation.best,
            not evaluation.best or bool(evaluation.every or evaluation.every_epochs),
            "set together with eval.every or eval.every_epochs",
        ),
        ("eval.patience", evaluation.patience, evaluation.patience >= 0, "at least 0"),
        ("eval.patience", evaluation.patience, not evaluation.patience or bool(evaluation.best), "0 without eval.best"),
    ]


def _untrained_rules(config: Config) -> Iterable[Rule]:
    """Without an update there is one event at most, the one before the first, and one model."""
    prune, best = config.prune, config.eval.best
    is_free = config.train.epochs > 0 or config.train.steps > 0
    is_single = is_free or prune.sparsity == 0
    reason = "with train.epochs 0, which has no other time for an event"
    return [
        ("prune.schedule", prune.schedule, is_single or prune.schedule == "fractions", f"fractions {reason}"),
        ("prune.fractions", prune.fractions, is_single or prune.fractions == (0,), f"0 alone {reason}"),
        ("eval.best", best, is_free or not best, "empty with train.epochs 0, which leaves one model"),
    ]


def _mesh_rules(mesh: MeshConfig) -> Iterable[Rule]:
    axes = [("data", mesh.data), ("fsdp", mesh.fsdp), ("tensor", mesh.tensor)]
    by_hand = bool(mesh.coordinator)
    address = re.fullmatch(r"\S+:(\d{1,5})", mesh.coordinator)
    is_address = not by_hand or (address is not None and 0 < int(address[1]) < 2**16)
    is_process = 0 <= mesh.process < mesh.processes if by_hand else mesh.process == -1
    return [
        *[(f"mesh.{name}", size, size >= 1, "at least 1") for name, size in axes],
        ("mesh.coordinator", mesh.coordinator, is_address, "host:port"),
        ("mesh.processes", mesh.processes, mesh.processes >= 1 if by_hand else mesh.processes == 0, _BY_HAND),
        ("mesh.process", mesh.process, is_process, _BY_HAND),
    ]


def _profile_rules(profile: ProfileConfig) -> Iterable[Rule]:
    return [
        ("profile.start", profile.start, profile.start >= 0, "at least 0"),
        ("profile.steps", profile.steps, profile.steps >= 0, "at least 0"),
    ]
