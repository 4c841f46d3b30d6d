"""Which values of the settings make sense, and which settings exclude each other."""

import re
from collections.abc import Iterable

from efx_jax.config import (
    GRADIENT_SCORES,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ProfileConfig,
    PruneConfig,
    TrainConfig,
)
from efx_jax.config_prune import Rule, prune_rules, refuse, target_rule

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
        *_adapted_rules(config),
        *_untrained_rules(config),
        *prune_rules(config.prune, config.train),
        *_atp_rules(config),
        *_train_rules(config.train),
        *_distill_rules(config),
        *_eval_rules(config.eval),
        *_mesh_rules(config.mesh),
        *_profile_rules(config.profile),
        ("seed", config.seed, 0 <= config.seed < 2**32, "in [0, 2^32)"),
    ]
    refuse(rules)


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
        target_rule("lora.targets", lora.targets),
    ]


def _adapted_rules(config: Config) -> Iterable[Rule]:
    prune, adapted = config.prune, config.lora.targets
    pruned, among = set(prune.targets), f"lora.targets ({', '.join(adapted)})"
    return [
        (
            "prune.targets",
            " ".join(prune.targets),
            prune.score != "lora_gradient" or pruned <= set(adapted),
            f"among {among} with prune.score lora_gradient, which reads their gradients",
        ),
        (
            "prune.targets",
            " ".join(prune.targets),
            prune.recovery not in ("pbs", "gram_pbs") or bool(pruned & set(adapted)),
            f"in part among {among} with prune.recovery {prune.recovery}, which moves their adapters",
        ),
    ]


def _atp_rules(config: Config) -> Iterable[Rule]:
    mesh, rate = config.mesh, config.atp.learning_rate
    by_entry = config.prune.score != "atp"
    expected = "1 with prune.score atp: the heads and hidden units left need not divide among devices; use mesh.data"
    return [
        *([] if by_entry else _unit_rules(config.prune)),
        ("atp.learning_rate", rate, rate > 0, "above 0"),
        ("mesh.fsdp", mesh.fsdp, by_entry or mesh.fsdp == 1, expected),
        ("mesh.tensor", mesh.tensor, by_entry or mesh.tensor == 1, expected),
    ]


def _unit_rules(prune: PruneConfig) -> Iterable[Rule]:
    """Settings for which ATP leaves no choice."""
    times, all_seven = prune.fractions, PruneConfig().targets
    found: list[tuple[str, object, bool, str, str]] = [
        (
            "mask_forward",
            prune.mask_forward,
            prune.mask_forward == "frozen",
            "frozen",
            "pruned units keep their adapters until its group lasso has emptied them",
        ),
        (
            "recovery",
            prune.recovery,
            prune.recovery == "none",
            "none",
            "its adapters learn to do without the pruned units",
        ),
        ("group", prune.group, prune.group == "row", "row, the default,", "units compete, not entries"),
        ("budget", prune.budget, prune.budget == "uniform", "uniform", "it scores no entries"),
        ("permute", prune.permute, not prune.permute, "false", "units compete, not entries"),
        ("swaps", prune.swaps, prune.swaps == 0, "0", "units compete, not entries"),
        ("ema", prune.ema, prune.ema == 1, "1", "it has one event"),
        (
            "merge_each_event",
            prune.merge_each_event,
            not prune.merge_each_event,
            "false",
            "its group lasso needs the adapters apart",
        ),
        (
            "targets",
            " ".join(prune.targets),
            set(prune.targets) == set(all_seven),
            "all seven linears",
            "a unit has rows and columns of several",
        ),
        ("schedule", prune.schedule, prune.schedule == "fractions", "fractions", "its search ends once"),
        ("fractions", times, len(times) == 1 and times[0] > 0, "one share above 0", "it searches until then"),
    ]
    return [
        (f"prune.{name}", value, is_right, f"{wanted} with prune.score atp: {reason}")
        for name, value, is_right, wanted, reason in found
    ]


def _train_rules(train: TrainConfig) -> Iterable[Rule]:
    micro = train.micro_batch or train.batch_size
    return [
        (
            "train.epochs",
            train.epochs,
            0 < train.epochs <= 2**20 or (train.epochs == 0 and train.steps == 0),
            "above 0 and at most 2^20, or 0 with train.steps 0 to train nothing",
        ),
        ("train.steps", train.steps, 0 <= train.steps < 2**31, "in [0, 2^31)"),
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


def _distill_rules(config: Config) -> Iterable[Rule]:
    distill = config.distill
    return [
        ("distill.weight", distill.weight, distill.weight > 0, "above 0"),
        ("distill.row_share", distill.row_share, 0 < distill.row_share <= 1, "in (0, 1]"),
        ("distill.prefix_share", distill.prefix_share, 0 < distill.prefix_share <= 1, "in (0, 1]"),
        ("distill.share", distill.share, 0 < distill.share <= 1, "in (0, 1]"),
        ("distill.text_share", distill.text_share, 0 < distill.text_share < 1, "in (0, 1)"),
        (
            "distill.text",
            distill.text,
            not distill.text or config.prune.score not in GRADIENT_SCORES,
            f"empty with prune.score {config.prune.score}, which reads the gradients of training rows",
        ),
        (
            "distill.teacher",
            distill.teacher,
            not distill.teacher or config.prune.score != "atp",
            "empty with prune.score atp, whose masks change in every step of its search",
        ),
    ]


def _eval_rules(evaluation: EvalConfig) -> Iterable[Rule]:
    return [
        ("eval.rows", evaluation.rows, evaluation.rows >= 0, "at least 0"),
        ("eval.text_tokens", evaluation.text_tokens, evaluation.text_tokens >= 0, "at least 0"),
        ("eval.window", evaluation.window, evaluation.window >= 2, "at least 2"),
        ("eval.samples", evaluation.samples, evaluation.samples >= 0, "at least 0"),
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
    """Without updates there is at most one event, the one before training, and one model."""
    prune, best = config.prune, config.eval.best
    is_free = config.train.epochs != 0 or config.train.steps > 0
    is_single = is_free or prune.sparsity == 0
    reason = "with train.epochs 0, which has no other time for an event"
    return [
        (
            "prune.score",
            prune.score,
            is_free or prune.score != "atp",
            "one of entries with train.epochs 0: atp learns in training",
        ),
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
