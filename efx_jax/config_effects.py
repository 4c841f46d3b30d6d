"""Which settings of a command line have no effect because another setting disables them."""

import warnings
from collections.abc import Collection

from efx_jax.config import Config
from efx_jax.config_event import ACROSS_ROWS, goes_by_block, reads_importance
from efx_jax.config_prune import events_asked
from efx_jax.config_values import setting_types
from efx_jax.errors import FallbackWarning


def warn_of_idle_flags(config: Config, given: Collection[str]) -> None:
    """Warns of flags that do not do what the user expects.

    Settings of a preset or a file may become idle when a flag overrides another one; an idle flag is a mistake.

    Args:
        config: the resolved settings.
        given: dotted paths of the settings that the command line named.
    """
    for setting, condition in idle_settings(config).items():
        if setting in given:
            warnings.warn(f"--{setting} has no effect without {condition}", FallbackWarning, stacklevel=2)
    if "train.epochs" in given and config.train.steps > 0 and "train.steps" not in given:
        warnings.warn(
            f"train.epochs {config.train.epochs:g}: the run still has train.steps {config.train.steps} updates, whose "
            "parts these epochs are; add --train.steps 0 for passes over the data",
            FallbackWarning,
            stacklevel=2,
        )


def idle_settings(config: Config) -> dict[str, str]:
    """Settings, by dotted path, that have no effect given the others, and the condition under which they would."""
    prune, distill, evaluation = config.prune, config.distill, config.eval
    within_rows = prune.group not in ACROSS_ROWS
    refines = prune.recovery == "admm" and prune.admm_refine > 0
    is_averaged = events_asked(prune, config.train) > 1
    gives_fixed_shares = prune.budget == "uniform" or (prune.budget == "owl" and not is_averaged)
    reads_loss = prune.score == "foresight_loss" and reads_importance(prune)
    parts: list[tuple[bool, str, str]] = [
        (prune.schedule != "fractions", "prune.schedule fractions", "prune.fractions"),
        (prune.schedule != "cubic", "prune.schedule cubic", "prune.events prune.ramp"),
        (prune.group != "bounded", "prune.group bounded", "prune.bound"),
        (within_rows, "prune.group matrix, slab or bounded", "prune.row_targets"),
        (not set(prune.row_targets) & set(prune.targets), "one of them in prune.targets", "prune.row_targets"),
        (
            # A plain last event has no recovery; where a later event keeps more, its score decides what comes back.
            refines and within_rows and not prune.plain_last_event and gives_fixed_shares,
            "prune.admm_refine 0 or a group across rows: ADMM chooses the entries of every row",
            "prune.score",
        ),
        (not is_averaged, "several events", "prune.ema"),
        (
            prune.recovery == "none" and prune.ema == 1,
            "a recovery or prune.ema below 1, which it leaves out",
            "prune.plain_last_event",
        ),
        (prune.budget != "global", "prune.budget global", "prune.budget_spread"),
        (prune.budget != "owl", "prune.budget owl", "prune.owl_lambda prune.owl_multiple"),
        (prune.score != "ria", "prune.score ria", "prune.ria_power"),
        (
            not reads_loss,
            "prune.score foresight_loss with entries that compare across rows",
            "prune.gradient_labels prune.reach_shrink",
        ),
        (
            not (reads_loss or prune.permute or (prune.budget != "uniform" and goes_by_block(prune))),
            "prune.score foresight_loss, prune.permute, or another prune.budget than uniform in an event by blocks",
            "prune.survey_share",
        ),
        (prune.score != "lora_gradient", "prune.score lora_gradient", "prune.gradient_batches"),
        (
            prune.score != "dpruner",
            "prune.score dpruner",
            "prune.domain_steps prune.domain_learning_rate prune.domain_loss_scale prune.general_weight",
        ),
        (prune.score != "atp", "prune.score atp", "atp.space atp.learning_rate"),
        (prune.score == "atp", "a score of entries", "prune.sequential prune.plain_last_event"),
        (prune.recovery != "pbs", "prune.recovery pbs", "prune.ridge"),
        (prune.recovery != "gram_pbs", "prune.recovery gram_pbs", "prune.chunk_mib"),
        (prune.recovery != "admm", "prune.recovery admm", "prune.admm_steps prune.admm_damping prune.admm_refine"),
        (not distill.teacher, "distill.teacher", "distill.weight distill.row_share distill.prefix_share distill.share"),
        (not (distill.teacher and distill.text), "distill.teacher and distill.text", "distill.text_share"),
        (bool(config.data.text), "an empty data.text", "data.holdout"),
        (not config.profile.steps, "profile.steps above 0", "profile.start"),
        (evaluation.protocol != "sampled", "eval.protocol sampled", "eval.runs"),
        (not (evaluation.every or evaluation.every_epochs), "eval.every or eval.every_epochs", "eval.tasks"),
    ]
    found = {setting: condition for is_idle, condition, names in parts if is_idle for setting in names.split()}
    if prune.sparsity:
        return found
    sections = ("prune", "atp", "distill")
    method = [name for name in setting_types() if name.partition(".")[0] in sections and name != "prune.sparsity"]
    return found | dict.fromkeys(method, "prune.sparsity above 0")
