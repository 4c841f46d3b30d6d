"""What `python train.py` understands: presets, files and flags, and what it says to a mistake."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from efx_jax.config import Config, PruneConfig
from efx_jax.config_effects import idle_settings
from efx_jax.config_io import PRESETS, config_folder, from_yaml, load_config, resolve, to_yaml
from efx_jax.config_rules import validate
from efx_jax.config_values import setting_types
from efx_jax.errors import FallbackWarning, InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_file


def error_of(argv):
    with pytest.raises(InputError) as caught:
        resolve(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_argument_means_the_quickstart():
    resolved = resolve([])
    assert resolved.config == load_config(config_folder() / "quickstart.yaml")
    assert (resolved.config.model.path, resolved.config.data.train) == ("quickstart", "icd10")
    assert (resolved.output, resolved.dry_run) == (Path("runs/quickstart"), False)


def test_flag_overrides_file_and_file_overrides_preset(write):
    path = write("prune: {ema: 0.25, sparsity: 0.3}")
    config = resolve(["--preset", "paper", "--config", path, "--prune.sparsity", "0.6"]).config
    assert (config.prune.recovery, config.prune.ema, config.prune.sparsity) == ("pbs", 0.25, 0.6)


def test_file_names_its_own_preset_and_the_flag_replaces_it(write):
    path = write("preset: official\nseed: 3")
    assert resolve(["--config", path]).config.prune.mask_forward == "dense"
    replaced = resolve(["--config", path, "--preset", "paper"]).config
    assert (replaced.prune.mask_forward, replaced.seed) == ("exact", 3)


def test_no_preset_leaves_out_that_of_the_file(write):
    path = write("preset: official\nseed: 3")
    assert resolve(["--config", path, "--preset", "none"]).config == dataclasses.replace(Config(), seed=3)


def test_preset_alone_reads_no_file():
    resolved = resolve(["--preset", "paper"])
    assert (resolved.config, resolved.output) == (load_config(preset="paper"), Path("runs/paper"))


@pytest.mark.parametrize(
    "argv",
    [
        ["--prune.mask_forward=frozen", "--dry-run"],
        ["--dry_run", "--prune.mask-forward", "frozen"],
        ["--prune.mask_forward", "ste", "--prune.mask_forward", "frozen", "--dry-run", "true"],
    ],
)
def test_every_spelling_of_a_flag_means_the_same(argv):
    resolved = resolve(argv)
    assert (resolved.config.prune.mask_forward, resolved.dry_run) == ("frozen", True)


def test_output_takes_the_name_of_the_file_unless_given(write):
    path = write("seed: 1", "llama_billsum.yaml")
    assert resolve(["--config", path]).output == Path("runs/llama_billsum")
    assert resolve(["--config", path, "--output", "elsewhere"]).output == Path("elsewhere")


@pytest.mark.parametrize("texts", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj,", "v_proj"]])
def test_tuples_are_separated_by_spaces_or_commas(texts):
    assert resolve(["--lora.targets", *texts]).config.lora.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--log.wandb"], True),
        (["--log.wandb", "true"], True),
        (["--log.wandb=False"], False),
        (["--log.wandb", "--log.no-wandb"], False),
    ],
)
def test_switches_are_read_with_and_without_a_value(argv, expected):
    assert resolve(argv).config.log.wandb is expected


def test_yaml_scalars_mean_what_the_flag_means(write):
    # Plain YAML 1.1 reads 2:4 in base 60, as 124, and 1e-4 as a string.
    path = write("prune:\n  group: 2:4\n  sparsity: 0.5\n  ramp: [0, 1]\ntrain:\n  learning_rate: 1e-4\n  steps: 10")
    config = resolve(["--config", path]).config
    assert (config.prune.group, config.train.learning_rate, config.train.steps) == ("2:4", 1e-4, 10)
    assert config.prune.ramp == (0.0, 1.0)


def test_an_empty_value_is_an_empty_text(write):
    assert resolve(["--data.text", "", "--config", write("data:\n  text: x\nlora:\n")]).config.data.text == ""


def test_unknown_flag_names_the_nearest():
    message = error_of(["--prune.sparcity", "0.5"])
    assert "--prune.sparcity" in message
    assert "--prune.sparsity" in message


def test_bare_field_name_finds_its_section():
    assert "the nearest is --lora.rank;" in error_of(["--rank", "4"])


def test_unknown_key_in_a_file_names_the_file_the_key_and_the_nearest(write):
    path = write("prune:\n  sparcity: 0.5")
    assert f"{path}: prune.sparcity is not a setting; the nearest is prune.sparsity;" in error_of(["--config", path])


def test_unknown_section_names_a_setting_that_exists(write):
    path = write("prun:\n  sparsity: 0.5")
    assert f"{path}: prun is not a setting; the nearest is prune." in error_of(["--config", path])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--train.steps", "many"], "--train.steps must be an integer, found 'many'"),
        (["--train.steps", "1.5"], "--train.steps must be an integer, found '1.5'"),
        (["--train.learning_rate", "fast"], "--train.learning_rate must be a finite number, found 'fast'"),
        (["--train.learning_rate", "nan"], "--train.learning_rate must be a finite number, found 'nan'"),
        (["--log.wandb", "maybe"], "--log.wandb must be true or false, found 'maybe'"),
        (["--prune.score", "wand"], "--prune.score must be one of magnitude, wanda, ria, foresight"),
        (["--prune.ramp", "0.1"], "--prune.ramp must be 2 values, each a finite number, found 1"),
        (["--prune.fractions", "a,b"], "--prune.fractions must be a finite number, found 'a'"),
        (["--seed", "1", "2"], "--seed must be an integer, found 2 values: 1 2"),
        (["--seed"], "--seed lacks its value; expected an integer"),
        (["--preset", "fast"], "preset 'fast' is not known; expected one of paper, official, efx, or none"),
        (["quickstart.yaml"], "'quickstart.yaml' does not follow a flag"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read: No such file or directory"),
        (["--config", ""], "--config must not be empty; name one, or leave --config out"),
        (["--preset="], "--preset must not be empty; name one, or leave --preset out"),
        (["--output", ""], "--output must not be empty; name one, or leave --output out"),
    ],
)
def test_wrong_value_is_refused_with_one_line(argv, expected):
    assert expected in error_of(argv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  steps: [1, 2]", "train.steps must be an integer, found 2 values"),
        ("train:\n  steps: {a: 1}", "train.steps must be an integer, found"),
        ("train: 3", "train must hold fields below it, found '3'"),
        ("- 1\n- 2", "expected sections"),
        ("train:\n\tsteps: 3", "mine.yaml:2: broken YAML"),
        ("train:\n  steps: 3\n  epochs: 1\n  steps: 4", "mine.yaml:4: steps is given twice"),
        ("train: {steps: 3}\neval: {rows: 3}\ntrain: {epochs: 2}", "mine.yaml:3: train is given twice"),
        ("preset: fast", "preset 'fast' is not known"),
    ],
)
def test_malformed_file_is_refused_with_one_line_that_names_it(write, text, expected):
    message = error_of(["--config", write(text)])
    assert expected in message
    assert "mine.yaml" in message or "preset" in message


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_survive_yaml(preset):
    config = load_config(preset=preset)
    validate(config)
    assert from_yaml(to_yaml(config)) == config
    assert config != Config()


def test_written_config_is_read_back_whatever_it_holds(write):
    prune = dataclasses.replace(Config().prune, group="2:4", ridge=1e-8, fractions=(0.1, 1.0), targets=("up_proj",))
    data = dataclasses.replace(Config().data, train="true", text="12", template='{a}\n"=> \u00e9: {b}')
    config = dataclasses.replace(Config(), prune=prune, data=data, seed=7)
    assert resolve(["--config", write(to_yaml(config))]).config == config


def test_paper_preset_is_algorithm_1():
    config = load_config(preset="paper")
    assert (config.train.epochs, config.prune.schedule, config.prune.ema) == (3, "epochs", 0.5)
    assert (config.prune.score, config.prune.group, config.prune.recovery) == ("foresight", "row", "pbs")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0)
    assert (config.prune.ridge, config.train.learning_rate, config.train.weight_decay) == (1e-8, 1e-4, 0.01)
    assert (config.prune.calibration_rows, config.prune.calibration_length) == (128, 2048)


# Comparisons are no settings of one run: tests/compare reads them.
RUNS = sorted(path for path in config_folder().glob("*.yaml") if not path.stem.startswith("compare_"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    validate(load_config(path))


def test_script_answers_a_mistake_with_one_line_and_code_2():
    command = [sys.executable, "train.py", "--prune.sparcity", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--prune.sparsity" in done.stderr


def test_script_tells_a_warning_in_one_line():
    command = [sys.executable, "train.py", "--help", "--prune.events", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        0,
        "warning: --prune.events has no effect without prune.schedule cubic\n",
    )


def test_help_lists_every_setting_with_the_value_it_would_have():
    command = [sys.executable, "train.py", "--help", "--preset", "paper", "--seed", "41"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"COLUMNS": "200"})
    assert done.returncode == 0
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
            assert f"--{section.name}.{field.name} " in done.stdout
    assert "(default: pbs)" in done.stdout
    assert "(default: 41)" in done.stdout


def test_epochs_beside_the_steps_of_a_file_are_warned_of(write):
    path = write("train:\n  steps: 90\n")
    with pytest.warns(FallbackWarning, match="still has train.steps 90 updates, .* add --train.steps 0"):
        resolve(["--config", path, "--train.epochs", "5"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(["--config", path, "--train.epochs", "5", "--train.steps", "0"]).config.train.epochs == 5


@pytest.mark.parametrize(
    ("flags", "condition"),
    [
        (["--prune.fractions", "0.2"], "prune.schedule fractions"),
        (["--prune.ramp", "0", "0.4"], "prune.schedule cubic"),
        (["--prune.bound", "0.1"], "prune.group bounded"),
        (["--prune.row-targets", "v_proj"], "prune.group matrix, slab or bounded"),
        (["--prune.owl_lambda", "0.1"], "prune.budget owl"),
        (["--prune.admm_steps", "5"], "prune.recovery admm"),
        (["--prune.reach_shrink", "0.5"], "prune.score foresight_loss with entries that compare across rows"),
        (
            ["--prune.gradient_labels", "text", "--prune.score", "foresight_loss", "--prune.ema", "1"],
            "prune.score foresight_loss with entries that compare across rows",
        ),
        (["--atp.learning_rate", "0.1"], "prune.score atp"),
        (["--distill.row_share", "0.5"], "distill.teacher"),
        (["--eval.runs", "2"], "eval.protocol sampled"),
        (["--profile.start", "5"], "profile.steps above 0"),
        (["--data.holdout", "0.2", "--data.text", "wikitext"], "an empty data.text"),
        (
            ["--prune.survey_share", "0.1", "--prune.budget", "owl"],
            "prune.score foresight_loss, prune.permute, or another prune.budget than uniform in an event by blocks",
        ),
        (["--prune.ema", "0.5", "--train.epochs", "1"], "several events"),
        (
            ["--prune.plain_last_event", "--prune.recovery", "none", "--prune.ema", "1"],
            "a recovery or prune.ema below 1, which it leaves out",
        ),
        (
            ["--prune.row_targets", "v_proj", "--prune.targets", "q_proj", "--prune.group", "matrix"],
            "one of them in prune.targets",
        ),
        (
            ["--prune.score", "ria", "--prune.recovery", "admm", "--prune.admm_refine", "5"],
            "prune.admm_refine 0 or a group across rows: ADMM chooses the entries of every row",
        ),
        (["--prune.swaps", "3", "--prune.sparsity", "0"], "prune.sparsity above 0"),
        (["--distill.teacher", "base", "--prune.sparsity", "0"], "prune.sparsity above 0"),
        (["--eval.runs", "2", "--prune.sparsity", "0"], "eval.protocol sampled"),
    ],
)
def test_a_flag_that_changes_nothing_is_warned_of(flags, condition):
    with pytest.warns(FallbackWarning, match=f"{flags[0].replace('-t', '_t')} has no effect without {condition}$"):
        resolve(["--preset", "paper", *flags])


def test_a_score_that_decides_a_last_event_or_what_comes_back_is_not_idle():
    once = PruneConfig(recovery="admm", admm_refine=5, admm_steps=9, schedule="fractions", fractions=(0.5,), ema=1.0)
    twice = dataclasses.replace(once, fractions=(0.2, 0.5))
    for prune in (once, twice, dataclasses.replace(once, budget="owl")):
        assert "prune.score" in idle_settings(Config(prune=prune))
    for change in ({"plain_last_event": True}, {"budget": "owl"}, {"budget": "global"}, {"group": "bounded"}):
        assert "prune.score" not in idle_settings(Config(prune=dataclasses.replace(twice, **change)))


def test_rows_of_ones_own_under_the_quickstarts_settings_are_warned_of():
    with pytest.warns(FallbackWarning, match="mine.jsonl without --config: .* configs/own_data.yaml"):
        resolve(["--data.train", "mine.jsonl"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(["--data.train", "mine.jsonl", "--preset", "efx"])
        resolve(["--model.path", "models/mine"])


def test_flags_that_are_read__and_idle_settings_of_a_preset_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(["--preset", "efx", "--prune.schedule", "epochs", "--prune.group", "row", "--prune.budget", "uniform"])
        resolve(["--preset", "efx", "--prune.fractions", "0.2", "--prune.bound", "0.1", "--prune.admm_steps", "15"])
        resolve(["--preset", "paper", "--eval.protocol", "sampled", "--eval.runs", "2", "--prune.ridge", "1e-6"])


def test_every_setting_that_may_lie_idle_exists():
    idle = idle_settings(Config())
    assert len(idle) == 33  # by default nothing but the score, uniform within rows, is asked for
    assert set(idle) <= set(setting_types())
