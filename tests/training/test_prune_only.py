"""No epochs and no steps: one event on the model as it is, or none, and the export of what that leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import efx_jax
from efx_jax.config import Config, DataConfig, EvalConfig, ModelConfig, PruneConfig, TrainConfig
from efx_jax.config_io import load_config
from efx_jax.config_rules import validate
from efx_jax.config_values import replace_values
from efx_jax.errors import InputError
from efx_jax.parallel.mesh import make_mesh
from efx_jax.training.plan import plan_text
from efx_jax.training.prepare import calibration, prepare
from tests.tiny import linears

UNTRAINED = ("--train.epochs", "0", "--train.steps", "0")
ONE_SHOT = (*UNTRAINED, "--prune.schedule", "fractions", "--prune.fractions", "0")
SETTINGS = {"train.epochs": 0.0, "prune.schedule": "fractions", "prune.fractions": (0.0,)}


@pytest.fixture(scope="module")
def one_shot(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("runs") / "one_shot", *ONE_SHOT)


def test_the_export_is_what_an_event_makes_of_the_base(one_shot: Path) -> None:
    config = load_config(one_shot / "config.yaml")
    prepared = prepare(config, make_mesh(config.mesh))
    params, spec = efx_jax.load_pretrained(config.model.path, dtype=None)
    stats = efx_jax.collect_statistics(params, calibration(config, prepared), spec)
    params, _, masks, _ = efx_jax.prune_event(params, None, None, stats, None, spec, config.prune)
    merged = efx_jax.merge(params, None, masks)["layers"]
    for name, weight in linears(one_shot / "export").items():
        assert (weight == 0).mean() == 0.5
        np.testing.assert_array_equal(weight, np.asarray(merged[name]))


def test_the_summary_counts_no_update(one_shot: Path) -> None:
    summary = json.loads((one_shot / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (0, 0)
    assert [event["step"] for event in summary["events"]] == [0]
    assert set(summary["results"]) == {"base", "sparse expert"}
    assert not (one_shot / "metrics.jsonl").exists()


def test_the_same_call_again_prints_the_table(
    one_shot: Path, launch: Any, files_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(one_shot)
    launch(one_shot, *ONE_SHOT)
    assert "sparse expert" in capsys.readouterr().out
    assert files_of(one_shot) == before


def test_cut_off_before_its_summary_it_goes_on_to_the_same_export(
    one_shot: Path, launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_of: Any
) -> None:
    """The event is not repeated: its outcome is in the checkpoint."""

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("efx_jax.training.run._export", fail)
        launch(tmp_path / "cut", *ONE_SHOT, code=130)
    monkeypatch.setattr("efx_jax.training.loop.prune_run", fail)
    launch(tmp_path / "cut", *ONE_SHOT)
    assert files_of(tmp_path / "cut" / "export") == files_of(one_shot / "export")


def test_without_sparsity_the_export_is_the_base(launch: Any, tmp_path: Path, tiny_folder: Path) -> None:
    """What a comparison refers one-shot pruning to."""
    run = launch(tmp_path / "base", *UNTRAINED, "--prune.sparsity", "0")
    base = linears(tiny_folder)
    for name, weight in linears(run / "export").items():
        np.testing.assert_array_equal(weight, base[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ("--prune.score", "lora_gradient", "--prune.gradient_batches", "2"),
        ("--prune.score", "dpruner", "--prune.domain_steps", "2"),
        ("--prune.recovery", "pbs"),
        ("--prune.recovery", "admm", "--prune.score", "foresight_gated", "--prune.group", "bounded"),
    ],
    ids=lambda method: method[1],
)
def test_scores_and_recoveries_need_no_update(
    method: tuple[str, ...], one_shot: Path, launch: Any, tmp_path: Path
) -> None:
    found, wanda = linears(launch(tmp_path / "run", *ONE_SHOT, *method) / "export"), linears(one_shot / "export")
    assert all(np.isfinite(weight).all() and (weight == 0).mean() == 0.5 for weight in found.values())
    assert any((weight != wanda[name]).any() for name, weight in found.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prune.schedule": "epochs"}, r"^prune.schedule must be fractions with train.epochs 0, which has no other"),
        ({"prune.schedule": "cubic"}, r"^prune.schedule must be fractions with train.epochs 0"),
        ({"prune.fractions": (0.0, 1.0)}, r"^prune.fractions must be 0 alone with train.epochs 0"),
        ({"prune.fractions": (1.0,)}, r"^prune.fractions must be 0 alone"),
        (
            {"prune.score": "atp", "prune.mask_forward": "frozen"},
            r"^prune.score must be one of entries with train.epochs 0: atp learns in training, found 'atp'$",
        ),
        ({"eval.best": "perplexity", "eval.every": 1}, r"^eval.best must be empty with train.epochs 0"),
        (
            {"train.steps": 3},
            r"^train.epochs must be above 0 and at most 2\^20, or 0 with train.steps 0 to .*, found 0.0$",
        ),
    ],
)
def test_what_needs_an_update_is_refused(change: dict[str, Any], said: str) -> None:
    validate(replace_values(Config(), SETTINGS))
    with pytest.raises(InputError, match=said):
        validate(replace_values(Config(), SETTINGS | change))


def test_without_sparsity_the_schedule_has_no_say() -> None:
    validate(replace_values(Config(), {"train.epochs": 0.0, "prune.sparsity": 0.0}))


def test_a_plan_says_that_nothing_is_trained(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "fever cough", "response": "lung"}) + "\n")
    config = Config(
        model=ModelConfig(path=str(tiny_folder)),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), max_length=32, holdout=0),
        eval=EvalConfig(window=32),
        prune=PruneConfig(schedule="fractions", fractions=(0,)),
        train=TrainConfig(epochs=0),
    )
    text = " ".join(plan_text(config).split())
    assert "training none: nothing but a prune event changes the model prune events step 0 to 50%" in text
    assert "GFLOP" not in text and "in a step" not in text and "in an event" in text
