"""Which settings are refused before anything is loaded."""

import dataclasses

import pytest

from efx_jax.config import Config
from efx_jax.config_event import n_of_m
from efx_jax.config_prune import validate_prune
from efx_jax.config_rules import validate
from efx_jax.config_values import replace_values
from efx_jax.errors import InputError


def test_the_defaults_are_valid():
    validate(Config())


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prune.sparsity", 1.0),
        ("prune.sparsity", -0.1),
        ("prune.group", "column"),
        ("prune.group", "4:2"),
        ("prune.group", "0:4"),
        ("prune.bound", -0.1),
        ("prune.targets", ()),
        ("prune.targets", ("lm_head",)),
        ("prune.row_targets", ("attn",)),
        ("prune.ema", 0.0),
        ("prune.ema", 1.5),
        ("prune.fractions", ()),
        ("prune.fractions", (-0.1, 0.5)),
        ("prune.fractions", (0.5, 0.5)),
        ("prune.fractions", (0.5, 1.5)),
        ("prune.ramp", (0.5, 0.2)),
        ("prune.events", 0),
        ("prune.ridge", -1e-8),
        ("prune.admm_steps", 0),
        ("prune.gradient_batches", 0),
        ("prune.domain_steps", -1),
        ("prune.domain_learning_rate", 0.0),
        ("prune.domain_loss_scale", 0.0),
        ("prune.general_weight", -0.1),
        ("prune.calibration_rows", 0),
        ("prune.survey_share", 0.0),
        ("prune.survey_share", 1.1),
        ("prune.reach_shrink", 1.5),
        ("lora.rank", 0),
        ("lora.alpha", 0.0),
        ("lora.dropout", 1.0),
        ("lora.targets", ("q_proj", "q_proj")),
        ("data.max_length", 1),
        ("data.new_tokens", -1),
        ("data.holdout", 1.0),
        ("train.learning_rate", 0.0),
        ("train.batch_size", 0),
        ("train.micro_batch", -1),
        ("train.epochs", -1.0),
        ("train.warmup", 1.0),
        ("eval.window", 1),
        ("seed", -1),
    ],
)
def test_value_out_of_range_is_refused_by_name(setting, value):
    with pytest.raises(InputError, match=rf"^{setting} must be .*, found ") as caught:
        validate(replace_values(Config(), {setting: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"prune.sparsity": 0.0}, {"prune.ema": 1.0}, {"prune.fractions": (0.0, 1.0)}])
def test_values_at_the_edge_are_accepted(settings):
    validate(replace_values(Config(), settings))


def test_n_of_m_fixes_the_sparsity_unless_nothing_is_pruned():
    validate(replace_values(Config(), {"prune.group": "1:4", "prune.sparsity": 0.75}))
    validate(replace_values(Config(), {"prune.group": "1:4", "prune.sparsity": 0.0}))
    expected = r"prune.sparsity must be 1 - 1/4 = 0.75 with prune.group 1:4, or 0, found 0.5"
    with pytest.raises(InputError, match=expected):
        validate(replace_values(Config(), {"prune.group": "1:4", "prune.sparsity": 0.5}))


def test_n_of_m_excludes_a_ramp_of_sparsities():
    settings = {"prune.group": "2:4", "prune.sparsity": 0.5, "prune.schedule": "cubic"}
    with pytest.raises(InputError, match="prune.schedule must be epochs or fractions"):
        validate(replace_values(Config(), settings))


@pytest.mark.parametrize("recovery", ["none", "pbs"])
def test_where_nothing_is_trained_every_forward_will_do(recovery: str) -> None:
    settings = {
        "train.epochs": 0.0,
        "prune.schedule": "fractions",
        "prune.fractions": (0.0,),
        "prune.recovery": recovery,
    }
    for mask_forward in ("exact", "ste", "frozen", "dense"):
        validate(replace_values(Config(), settings | {"prune.mask_forward": mask_forward}))


def test_training_that_never_sees_a_mask_comes_before_the_last_event() -> None:
    settings = {"prune.schedule": "fractions", "prune.mask_forward": "dense"}
    validate(replace_values(Config(), settings | {"prune.fractions": (0.0, 0.5, 1.0)}))
    validate(replace_values(Config(), settings | {"prune.fractions": (0.0,), "prune.sparsity": 0.0}))
    validate(replace_values(Config(), settings | {"prune.schedule": "cubic", "prune.ramp": (0.0, 1.0)}))
    said = "prune.mask_forward must be exact, ste or frozen with the last event before the end: "
    for early in ({"prune.fractions": (0.0,)}, {"prune.fractions": (0.1, 0.5)}, {"prune.schedule": "cubic"}):
        for merged in (False, True):
            with pytest.raises(InputError, match=said):
                validate(replace_values(Config(), settings | early | {"prune.merge_each_event": merged}))


@pytest.mark.parametrize("recovery", ["pbs", "gram_pbs"])
def test_a_recovery_of_adapters_needs_one_on_a_pruned_matrix(recovery: str) -> None:
    settings = {"prune.recovery": recovery, "lora.targets": ("q_proj",)}
    validate(replace_values(Config(), settings))
    said = rf"prune.targets must be in part among lora.targets \(q_proj\) with prune.recovery {recovery}"
    with pytest.raises(InputError, match=said):
        validate(replace_values(Config(), settings | {"prune.targets": ("k_proj",)}))


def test_shares_of_one_threshold_have_no_memory_and_units_that_change_places_are_read() -> None:
    shares = {"prune.score": "foresight_loss", "prune.budget": "global", "prune.group": "bounded"}
    validate(replace_values(Config(), shares))
    with pytest.raises(InputError, match="prune.ema must be 1 with prune.budget global"):
        validate(replace_values(Config(), shares | {"prune.ema": 0.5}))
    moved = {"prune.permute": True, "prune.group": "2:4", "prune.recovery": "admm"}
    validate(replace_values(Config(), moved | {"prune.targets": ("q_proj", "down_proj")}))
    with pytest.raises(InputError, match="prune.permute must be false without o_proj or down_proj"):
        validate(replace_values(Config(), moved | {"prune.targets": ("q_proj", "gate_proj")}))


@pytest.mark.parametrize(
    "schedule",
    [
        {"prune.schedule": "fractions", "prune.fractions": (0.5,)},
        {"prune.schedule": "cubic", "prune.events": 1},
        {"train.epochs": 0.8},
    ],
)
def test_a_plain_last_event_leaves_a_recovery_to_earlier_ones(schedule: dict[str, object]) -> None:
    settings = schedule | {"prune.plain_last_event": True}
    validate(replace_values(Config(), settings))
    with pytest.raises(InputError, match="prune.plain_last_event must be false with a single event, or .* pbs would"):
        validate(replace_values(Config(), settings | {"prune.recovery": "pbs"}))


@pytest.mark.parametrize("mask_forward", ["dense", "frozen"])
def test_adapters_that_fit_under_a_mask_are_not_trained_without_it(mask_forward: str) -> None:
    settings = {"prune.mask_forward": mask_forward, "prune.recovery": "gram_pbs"}
    said = "prune.mask_forward must be exact or ste with prune.recovery gram_pbs, whose adapters fit under the mask"
    with pytest.raises(InputError, match=said):
        validate(replace_values(Config(), settings))
    if mask_forward == "frozen":
        for early in ({"prune.fractions": (0.5,)}, {"prune.fractions": (0.5, 1.0)}):
            with pytest.raises(InputError, match=said):
                validate(replace_values(Config(), settings | {"prune.schedule": "fractions"} | early))
    for allowed in (
        {"prune.merge_each_event": True},
        {"prune.recovery": "admm"},
        {"prune.schedule": "fractions", "prune.fractions": (1.0,)},
        {"prune.schedule": "cubic", "prune.events": 1, "prune.ramp": (0.0, 1.0)},
        {"train.epochs": 0.5},
        {"prune.sparsity": 0.0},
    ):
        validate(replace_values(Config(), settings | allowed))


def test_every_source_of_calibration_has_a_row() -> None:
    settings: dict[str, object] = {"prune.calibration": ("train", "c4"), "prune.calibration_rows": 2}
    validate(replace_values(Config(), settings))
    with pytest.raises(InputError, match="prune.calibration_rows must be at least 2, a row of each of prune.calib"):
        validate(replace_values(Config(), settings | {"prune.calibration_rows": 1}))


def test_a_part_of_an_epoch_has_an_event_of_its_own() -> None:
    validate(replace_values(Config(), {"train.epochs": 1.2, "prune.plain_last_event": True, "prune.recovery": "pbs"}))


def test_a_score_of_adapter_gradients_needs_an_adapter_on_all_that_it_prunes():
    settings = {"lora.targets": ("q_proj", "v_proj"), "prune.score": "lora_gradient"}
    with pytest.raises(InputError, match=r"prune.targets must be among lora.targets \(q_proj, v_proj\)"):
        validate(replace_values(Config(), settings))
    validate(replace_values(Config(), {**settings, "prune.targets": ("v_proj",)}))
    validate(replace_values(Config(), {**settings, "prune.score": "wanda"}))


ATP = {"prune.score": "atp", "prune.mask_forward": "frozen", "prune.schedule": "fractions", "prune.fractions": (0.5,)}


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("prune.mask_forward", "exact", "frozen with prune.score atp: pruned units keep their adapters until"),
        ("prune.recovery", "admm", "none with prune.score atp: its adapters learn to do without"),
        ("prune.swaps", 3, "0 with prune.score atp: units compete, not entries"),
        ("prune.group", "2:4", "row, the default, with prune.score atp: units compete, not entries"),
        ("prune.budget", "owl", "uniform with prune.score atp: it scores no entries"),
        ("prune.ema", 0.5, "1 with prune.score atp: it has one event"),
        ("prune.merge_each_event", True, "false with prune.score atp: its group lasso needs the adapters apart"),
        (
            "prune.targets",
            ("q_proj",),
            "all seven linears with prune.score atp: a unit has rows and columns of several",
        ),
        ("prune.schedule", "epochs", "fractions with prune.score atp: its search ends once"),
        ("prune.fractions", (0.2, 0.5), "one share above 0 with prune.score atp: it searches until then"),
        ("prune.fractions", (0.0,), "one share above 0 with prune.score atp: it searches until then"),
        ("mesh.fsdp", 2, "1 with prune.score atp: the heads and hidden units left need not divide among devices"),
        ("mesh.tensor", 2, "1 with prune.score atp: the heads and hidden units left need not divide among devices"),
        ("atp.learning_rate", 0.0, "above 0"),
    ],
)
def test_what_atp_leaves_no_choice_in_is_refused_with_the_reason(setting: str, value: object, reason: str) -> None:
    validate(replace_values(Config(), ATP | {"mesh.data": 4, "prune.fractions": (1.0,)}))
    sparsity = {"prune.sparsity": 0.5 if value == "2:4" else 0.4}
    with pytest.raises(InputError, match=f"^{setting} must be {reason}.*, found ") as caught:
        validate(replace_values(Config(), ATP | sparsity | {setting: value}))
    assert "\n" not in str(caught.value)


def test_a_prune_event_refuses_atp_which_learns_in_the_course_of_a_run() -> None:
    with pytest.raises(InputError, match=r"^prune.score must be a score of entries: atp learns .* found 'atp'$"):
        validate_prune(replace_values(Config(), ATP).prune)


def test_batch_must_be_a_multiple_of_the_micro_batch():
    validate(replace_values(Config(), {"train.batch_size": 12, "train.micro_batch": 4}))
    with pytest.raises(InputError, match="train.batch_size must be a multiple of train.micro_batch 5, found 12"):
        validate(replace_values(Config(), {"train.batch_size": 12, "train.micro_batch": 5}))


def test_group_text_gives_n_and_m():
    assert n_of_m("2:4") == (2, 4)
    assert n_of_m("row") is None
    assert n_of_m("4:4") is None


@pytest.mark.parametrize("address", ["nonsense", "1.2.3.4", ":80", "host:99999", "host:0", "host:", "a b:80"])
def test_a_coordinator_is_a_host_and_a_port(address: str) -> None:
    hosts = {"mesh.processes": 2, "mesh.process": 0}
    validate(replace_values(Config(), hosts | {"mesh.coordinator": "[::1]:8476"}))
    with pytest.raises(InputError, match="mesh.coordinator must be host:port, found"):
        validate(replace_values(Config(), hosts | {"mesh.coordinator": address}))
