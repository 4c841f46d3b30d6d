"""What a comparison may say, which cells that makes, and what is refused with one line."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from efx_jax.compare.grid import choose_cells, list_cells, run_name
from efx_jax.compare.settings import read_comparison
from efx_jax.config import Config, DistillConfig, PruneConfig, TrainConfig
from efx_jax.config_io import config_folder, load_config, preset_settings
from efx_jax.config_values import replace_values
from efx_jax.errors import InputError

SMALL = """
base: {prune: {score: magnitude}}
methods: {dense: {prune: {sparsity: 0}}, wanda: {prune: {score: wanda}}, wide: {lora: {rank: 32}}}
schedules: {post_hoc: {prune: {schedule: fractions, fractions: [1]}}, during: {prune: {schedule: epochs}}}
evaluate: {texts: {general: wikitext}}
reference: dense
"""
Write = Callable[[str], Path]
SHIPPED = sorted(
    path
    for folder in (".", "ablations", "rivals")
    for path in (config_folder() / folder).glob("*.yaml")
    if "methods:" in path.read_text()
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        (tmp_path / "mine.yaml").write_text(text)
        return tmp_path / "mine.yaml"

    return write_file


def test_every_method_meets_every_schedule_and_the_dense_one_none(write: Write) -> None:
    cells = list_cells(read_comparison(write(SMALL)))
    assert [(cell.method, cell.schedule) for cell in cells] == [
        ("dense", ""),
        ("wanda", "post_hoc"),
        ("wanda", "during"),
        ("wide", "post_hoc"),
        ("wide", "during"),
    ]
    first, last = cells[1].config.prune, cells[-1].config
    assert (first.score, first.schedule, first.fractions) == ("wanda", "fractions", (1.0,))
    assert (last.prune.score, last.prune.schedule, last.lora.rank) == ("magnitude", "epochs", 32)
    assert {cell.reference for cell in cells} == {cells[0].run}


def test_runs_choose_pairs(write: Write) -> None:
    comparison = read_comparison(write(SMALL + "runs: {dense: , wanda: during}"))
    assert [cell.title for cell in list_cells(comparison)] == ["dense, seed 0", "wanda/during, seed 0"]


def test_a_methods_own_setting_holds_against_an_axis_and_equal_cells_are_one(write: Write) -> None:
    comparison = read_comparison(write(SMALL + "axes: {lora.rank: [8, 16], prune.sparsity: [0.3, 0.4]}\nseeds: [3, 4]"))
    cells = list_cells(comparison)
    post_hoc = [cell for cell in cells if cell.schedule != "during"]
    of = {name: [cell for cell in post_hoc if cell.method == name] for name in ("dense", "wanda", "wide")}
    assert [cell.axes for cell in of["dense"]] == [(8, None), (16, None)] * 2
    assert [cell.axes for cell in of["wanda"]] == [(8, 0.3), (8, 0.4), (16, 0.3), (16, 0.4)] * 2
    assert [cell.axes for cell in of["wide"]] == [(32, 0.3), (32, 0.4)] * 2
    assert [cell.seed for cell in of["dense"]] == [3, 3, 4, 4]
    # The reference has the same seed and, where it has a say, the same value.
    dense = {(cell.seed, cell.axes[0]): cell.run for cell in of["dense"]}
    assert all(cell.reference == dense[cell.seed, cell.axes[0]] for cell in of["wanda"])
    assert len({cell.run for cell in cells}) == len(cells)


def test_the_reference_has_the_value_that_a_method_fixes_on_an_axis(write: Write) -> None:
    cells = list_cells(read_comparison(write(SMALL + "axes: {lora.rank: [8, 32]}")))
    dense = {cell.axes: cell.run for cell in cells if cell.method == "dense"}
    assert {cell.axes: cell.reference for cell in cells if cell.method == "wanda"} == dense
    assert {cell.axes: cell.reference for cell in cells if cell.method == "wide"} == {(32,): dense[32,]}


def test_without_a_dense_run_of_the_value_that_a_method_fixes_there_is_no_reference(write: Write) -> None:
    cells = list_cells(read_comparison(write(SMALL + "axes: {lora.rank: [8, 16]}")))
    assert {cell.reference for cell in cells if cell.method == "wide"} == {""}
    assert "" not in {cell.reference for cell in cells if cell.method == "wanda"}


def test_a_method_has_no_seed_of_its_own(write: Write) -> None:
    with pytest.raises(InputError, match="methods: wide: seed: expected no seed of its own, found 7; set seeds"):
        read_comparison(write(SMALL.replace("{rank: 32}", "{rank: 32}, seed: 7")))


def test_a_dense_run_is_the_same_whatever_would_be_pruned(write: Write) -> None:
    runs = set()
    for score in ("wanda", "foresight"):
        for line in ("axes: {prune.ema: [0.1, 0.9]}", "axes: {prune.sparsity: [0.4]}", ""):
            comparison = read_comparison(write(SMALL.replace("score: magnitude", f"score: {score}") + line))
            runs |= {cell.run for cell in list_cells(comparison) if cell.method == "dense"}
    assert len(runs) == 1


def test_without_a_teacher_how_it_teaches_makes_no_other_run(write: Write) -> None:
    taught = 'base: {distill: {teacher: "%s", share: 0.5, text: c4}, '
    with_teacher, bare = (
        {cell.run for cell in list_cells(read_comparison(write(text)))}
        for text in (SMALL.replace("base: {", taught % "base"), SMALL.replace("base: {", taught % ""))
    )
    plain = {cell.run for cell in list_cells(read_comparison(write(SMALL)))}
    assert bare == plain and len(with_teacher & plain) == 1  # dense LoRA


def test_an_axis_of_a_teacher_has_no_value_where_none_teaches(write: Write) -> None:
    text = SMALL.replace("wide: {lora: {rank: 32}}", "wide: {distill: {teacher: base}}").replace("during:", "end:")
    cells = list_cells(read_comparison(write(text + "axes: {distill.share: [0.25, 0.5]}")))
    found = [(cell.method, cell.axes) for cell in cells if cell.schedule != "end"]
    assert found == [("dense", (None,)), ("wanda", (None,)), ("wide", (0.25,)), ("wide", (0.5,))]
    # Whether one teaches is told of what is pruned; its share only where one does.
    text = SMALL + 'axes: {distill.teacher: ["", base], distill.share: [0.25, 0.5]}\nruns: {dense: , wanda: [during]}'
    cells = list_cells(read_comparison(write(text)))
    assert [cell.axes for cell in cells] == [(None, None), ("", None), ("base", 0.25), ("base", 0.5)]
    assert len({cell.run for cell in cells}) == 4 and {cell.reference for cell in cells} == {cells[0].run}


def test_a_run_is_named_by_what_it_is_and_not_by_where_it_is_computed() -> None:
    name = run_name(Config())
    assert name.startswith("icd10-wanda-0.5-seed0-")
    elsewhere = {"mesh.fsdp": 4, "log.wandb": True, "profile.steps": 3}
    assert run_name(replace_values(Config(), elsewhere)) == name
    others = {"seed": 1, "prune.ema": 0.5, "data.max_length": 513, "train.steps": 1, "eval.rows": 1}
    assert len({run_name(replace_values(Config(), {key: value})) for key, value in others.items()} | {name}) == 6


def test_the_base_is_a_config_of_its_own_under_the_same_rules(write: Write) -> None:
    path = write(SMALL)
    path.with_name("base.yaml").write_text("preset: paper\nlora: {rank: 4}")
    paper = replace_values(load_config(preset="paper"), {"lora.rank": 4})
    text = SMALL.replace("{prune: {score: magnitude}}", "base.yaml")
    assert read_comparison(write(text)).base == paper
    text = SMALL.replace("base: {", "base: {config: base.yaml, preset: official, ")
    base = read_comparison(write(text)).base
    assert (base.prune.score, base.prune.mask_forward, base.lora.rank) == ("magnitude", "dense", 4)


def test_a_method_may_name_a_preset_below_its_own_settings(write: Write) -> None:
    """Over the base, and under the schedule that it meets."""
    text = SMALL.replace("wide: {", "wide: {preset: efx, train: {learning_rate: 5e-4}, ")
    cells = {cell.title: cell.config for cell in list_cells(read_comparison(write(text)))}
    settings, found = preset_settings("efx"), cells["wide/post_hoc, seed 0"]
    own = {"train.learning_rate": 5e-4, "lora.rank": 32, "prune.fractions": (1.0,)}
    assert found == replace_values(replace_values(Config(), settings), own)
    assert cells["wanda/post_hoc, seed 0"].prune.recovery == "none"


def test_only_takes_methods_schedules_and_pairs(write: Write) -> None:
    cells = list_cells(read_comparison(write(SMALL)))
    for names, expected in (([], 5), (["wanda"], 2), (["during"], 2), (["wide/during", "dense"], 2)):
        assert len(choose_cells(cells, names)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SMALL + "method: {}", "method is not known; the nearest is methods"),
        (SMALL.replace("score: wanda", "scroe: wanda"), "methods: wanda: prune.scroe is not a setting; the nearest is"),
        (
            SMALL.replace("wide: {", "wide: {preset: efxx, "),
            "methods: wide: preset: efxx is not known; the nearest",
        ),
        (SMALL.replace("wide: {", "wide: {preset: [efx], "), "methods: wide: preset: expected one text"),
        (SMALL.replace("during: {", "during: {preset: efx, "), "schedules: during: preset is not a setting"),
        (SMALL.replace("rank: 32", "rank: x"), "methods: wide: lora.rank must be an integer, found 'x'"),
        (SMALL.replace("wikitext", "[wikitext]"), "evaluate: texts: general: expected one text"),
        (SMALL.replace("texts: {general: wikitext}", "rows: 3"), "evaluate: expected tasks or texts to measure"),
        (SMALL.replace("evaluate: {", "evaluate: {rows: -1, "), "evaluate: rows must be at least 0, found -1"),
        (
            SMALL.replace("evaluate: {", "evaluate: {protocols: [best], "),
            "evaluate: protocols must be one of likelihood",
        ),
        (
            SMALL.replace("reference: dense", "reference: wanda"),
            "reference: expected a method that prunes nothing (dense)",
        ),
        (SMALL.replace("wide:", "a/b:"), "methods: expected names of letters, digits and _.+-, found 'a/b'"),
        (SMALL + "seeds: [0, 0]", "seeds: expected different values, found 0, 0"),
        (SMALL + "seeds: 1.5", "seeds must be an integer, found '1.5'"),
        (SMALL + "axes: {sparsity: [0.3]}", "axes: sparsity is not a setting to vary; the nearest is prune.sparsity"),
        (SMALL + "axes: {seed: [0]}", "axes: seed is not a setting to vary"),
        (SMALL + "axes: {mesh.data: [1, 2]}", "axes: mesh.data is not a setting to vary"),
        (SMALL + "axes: {prune.sparsity: 0.3}", "axes: prune.sparsity: expected a list of values, found '0.3'"),
        (SMALL + "runs: {wnada: [during]}", "runs: wnada is not known; the nearest is wanda"),
        (SMALL + "runs: {wanda: [late]}", "runs: wanda: late is not known"),
        (SMALL + "runs: {wanda: []}", "runs: wanda: expected at least one schedule, found none"),
        (SMALL + "runs: {dense: [during]}", "runs: dense prunes nothing, so it has no schedule, found during"),
        (SMALL.replace("{prune: {score: magnitude}}", "none.yaml"), "none.yaml cannot be read"),
        (
            SMALL + "axes: {train.learning_rate: [-1]}",
            "mine: no run is possible; dense, -1, seed 0: train.learning_rate",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    write: Write, launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert launch(write(text), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_name_is_answered_with_the_nearest(
    write: Write, launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(write(SMALL), tmp_path / "out", "--only", "dens") == 2
    assert (
        "--only dens: expected a method, a schedule or METHOD/SCHEDULE; the nearest is dense" in capsys.readouterr().err
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_cell_of_the_shipped_comparisons_is_possible(path: Path) -> None:
    cells = list_cells(read_comparison(path))
    assert [cell.refusal for cell in cells if cell.refusal] == []
    assert {cell.reference for cell in cells} - {""} == {cell.run for cell in cells if cell.method == "dense"}
    # Same data and tokens for all, but for what an axis says; how fast a method learns, and by how many updates, is its
    # own.
    assert len({with_equal_rows(cell.config.train) for cell in cells}) == 1


def with_equal_rows(settings: TrainConfig) -> TrainConfig:
    """The same rows learned one by one, at one rate."""
    if settings.steps:
        settings = dataclasses.replace(settings, steps=settings.steps * settings.batch_size, batch_size=1)
    return dataclasses.replace(settings, learning_rate=1.0)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_methods_of_the_shipped_comparisons_take_nothing_from_a_preset_that_they_do_not_name(path: Path) -> None:
    base = read_comparison(path).base
    own = {"sparsity", "calibration", "calibration_rows", "calibration_length", "score"}
    changed = {field.name for field in dataclasses.fields(PruneConfig)} - own
    assert {name for name in changed if getattr(base.prune, name) != getattr(PruneConfig(), name)} == set()
    assert base.distill == DistillConfig()


def test_the_ablations_share_their_runs_with_the_comparisons() -> None:
    """Dense LoRA, the paper's method and Wanda are trained once."""
    runs = {path.stem: {cell.run for cell in list_cells(read_comparison(path))} for path in SHIPPED}
    assert len(runs["sparsity"] & runs["schedules"]) == 4
    assert len(runs["rank"] & runs["schedules"]) == 2
    assert len(runs["ema"] & runs["schedules"]) == 5
    assert len(runs["domains"] & runs["schedules"]) == 3
    assert len(runs["efx_300k"] & runs["efx_health"]) == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_comparison_ends_in_figures_of_what_it_has(path: Path) -> None:
    """With one value of every axis that is not drawn, so that no two bars or lines have the same name."""
    comparison = read_comparison(path)
    assert comparison.figures
    for figure in comparison.figures.values():
        assert not set(comparison.axes) - {figure.x, *figure.only}


def test_the_calibration_ablation_prunes_once_on_either_text_with_30_seeds() -> None:
    cells = list_cells(read_comparison(config_folder() / "ablations" / "calibration.yaml"))
    assert len(cells) == len({cell.run for cell in cells}) == 30 * 2 * 2
    assert {cell.axes for cell in cells} == {(("train",),), (("c4",),)}
    assert {(cell.config.train.epochs, cell.config.train.steps, cell.config.prune.sparsity) for cell in cells} == {
        (0.0, 0, 0.5)
    }


FIGURE = "figures: {{a: {{x: {x}, y: {y}, kind: {kind}, only: {{{only}}}}}}}\naxes: {{lora.rank: [8, 16]}}\n"
GOOD = {"x": "lora.rank", "y": "perplexity.general", "kind": "lines", "only": "lora.rank: [8], schedule: during"}


def test_a_figure_is_read_with_values_of_their_type(write: Write) -> None:
    (figure,) = read_comparison(write(SMALL + FIGURE.format(**GOOD))).figures.values()
    assert (figure.x, figure.y, figure.kind) == ("lora.rank", "perplexity.general", "lines")
    assert figure.only == {"lora.rank": (8,), "schedule": ("during",)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": "prune.ema"}, "figures: a: x: prune.ema is not known; the nearest is .*; expected one of lora.rank, "),
        ({"y": "perplexity.legal"}, "figures: a: y: perplexity.legal is not measured here; expected one of sparsity, "),
        ({"y": "likelihood.hqs.rouge1"}, "figures: a: y: likelihood.hqs.rouge1 is not measured here"),
        ({"y": "likelihood.relative"}, "figures: a: y: likelihood.relative is not measured here"),
        ({"kind": "pie"}, "figures: a: kind must be one of lines, bars, points, heat_map, found 'pie'"),
        ({"only": "lora.rank: 32"}, "figures: a: only: lora.rank: expected some of 8, 16, found 32"),
        ({"only": "lora.rank: many"}, "figures: a: only: lora.rank must be an integer, found 'many'"),
        ({"only": "schedule: daily"}, "figures: a: only: schedule: expected some of post_hoc, during, found daily"),
        ({"only": "seed: 0"}, "figures: a: only: seed is not known"),
    ],
)
def test_a_figure_of_what_is_not_there_is_refused(change: dict[str, str], said: str, write: Write) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_comparison(write(SMALL + FIGURE.format(**(GOOD | change))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ("{a: {x: method, y: tokens}}", "figures: a: expected x, y and kind, found no kind"),
        ("{a: {x: method, y: tokens, kind: bars, z: 1}}", "figures: a: z is not known"),
        ("{../a: {x: method, y: tokens, kind: bars}}", "figures: expected names of letters"),
        ("[a]", "figures: expected keys with values below it"),
    ],
)
def test_a_malformed_figure_is_refused(figures: str, said: str, write: Write) -> None:
    with pytest.raises(InputError, match=said):
        read_comparison(write(SMALL + f"figures: {figures}"))


def test_metrics_of_tasks_are_taken_on_trust(write: Write) -> None:
    text = SMALL.replace("{texts:", "{tasks: [health], texts:")
    for metric in ("likelihood.hqs.rouge1", "likelihood.pubmedqa.accuracy", "likelihood.relative", "sparsity"):
        read_comparison(write(text + FIGURE.format(**(GOOD | {"y": metric}))))
    with pytest.raises(InputError, match="greedy.hqs.rouge1 is not measured here; .*, or PROTOCOL.TASK.METRIC"):
        read_comparison(write(text + FIGURE.format(**(GOOD | {"y": "greedy.hqs.rouge1"}))))


def test_an_axis_has_no_say_where_another_setting_leaves_it_out(write: Write) -> None:
    text = SMALL + "axes: {prune.bound: [0.1, 0.3]}\nruns: {dense: , wanda: [during], bounded: [during]}"
    text = text.replace("wide: {lora: {rank: 32}}", "bounded: {prune: {group: bounded}}")
    cells = list_cells(read_comparison(write(text)))
    assert [(cell.method, cell.axes) for cell in cells] == [
        ("dense", (None,)),
        ("wanda", (None,)),
        ("bounded", (0.1,)),
        ("bounded", (0.3,)),
    ]
    assert len({cell.run for cell in cells}) == 4
    plain = list_cells(read_comparison(write(SMALL + "runs: {dense: , wanda: [during]}")))
    assert plain[1].run == cells[1].run
