"""The command prints tables, writes whole files, and answers bad input with one line and exit code 2."""

import json
import pathlib
import shutil
import warnings

import pytest

from efx_jax.config import Config, DataConfig, EvalConfig, ModelConfig
from efx_jax.config_io import to_yaml
from efx_jax.data.tasks import load_text
from efx_jax.data.tokens import text_windows
from efx_jax.errors import FallbackWarning
from efx_jax.evaluation import __main__ as command
from efx_jax.evaluation import protocols
from efx_jax.evaluation.__main__ import main
from efx_jax.evaluation.perplexity import perplexity
from efx_jax.evaluation.relative import warn_of_another_dtype
from efx_jax.evaluation.report import write_evaluation
from efx_jax.lora import merge
from efx_jax.weights.hf import load_pretrained, load_tokenizer, save_pretrained
from efx_jax.weights.peft import load_adapter
from tests.weights.adapter_folders import tensors_for, write_adapter

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

TEMPLATE = ["--template", "{q} ? => {a}"]


def write(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def folder(tiny_folder) -> str:
    return str(tiny_folder)


@pytest.fixture
def text(tmp_path: pathlib.Path) -> str:
    return write(tmp_path / "text.jsonl", [{"text": "old skin rash . yes"}] * 9)


@pytest.fixture
def rows(tmp_path: pathlib.Path) -> str:
    questions = ("fever cough", "old skin", "heart")
    return write(
        tmp_path / "triage.jsonl", [{"q": q, "a": a} for q, a in zip(questions, ("yes", "no", "yes"), strict=True)]
    )


def says(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """Every generated text is one of the answers in turn, whatever the model."""

    def generate(params, spec, tokenizer, examples, max_new_tokens, adapters=None, masks=None, **options):
        seeds = options["seeds"] if options["sampling"] else (0,)
        return [[answers[(row + seed) % len(answers)] for row in range(len(examples))] for seed in seeds]

    monkeypatch.setattr(protocols, "generate_texts", generate)


def read(folder: pathlib.Path) -> tuple[dict, list[dict]]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return json.loads((folder / "summary.json").read_text()), [json.loads(line) for line in lines]


def test_the_tables_and_the_files_agree(folder, rows, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main([folder, "--tasks", rows, *TEMPLATE, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    summary, records = read(output)
    task = summary["tasks"]["triage"]
    assert f"| triage | 3 | {100 * task['accuracy']:.2f} [" in printed
    assert "| 66.67 (yes) | no (100 %) | 0.00 |" in printed
    assert (output / "results.md").read_text() == printed
    assert [record["gold"] for record in records] == ["yes", "no", "yes"]
    assert all(record["prediction"] == max(record["scores"], key=record["scores"].get) for record in records)
    assert [record["prompt"] for record in records] == ["fever cough ?", "old skin ?", "heart ?"]
    assert task["accuracy"] == pytest.approx(sum(r["prediction"] == r["gold"] for r in records) / 3)
    assert summary["perplexity"] is None and summary["relative"] is None


def test_an_evaluation_written_anew_is_whole_or_has_no_summary(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"text": None, "results": {}, "relative": None, "seconds": {}}
    write_evaluation(tmp_path, {}, records=[{"row": 0}], **results)
    assert read(tmp_path)[1] == [{"row": 0}]

    def stop(*arguments: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("efx_jax.evaluation.report.results_tables", stop)
    with pytest.raises(KeyboardInterrupt):
        write_evaluation(tmp_path, {}, records=[{"row": 1}], **results)
    assert not (tmp_path / "summary.json").exists()


def test_perplexity_of_a_text(folder, text, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([folder, "--text", text, "--window", "8", "--text-tokens", "20", "--output", str(tmp_path / "out")]) == 0
    )
    summary, records = read(tmp_path / "out")
    assert (summary["perplexity"]["tokens"], summary["perplexity"]["windows"]) == (17, 3)
    assert (summary["tasks"], records) == ({}, [])
    assert f"| {summary['perplexity']['value']:.3f} [" in capsys.readouterr().out


def test_results_are_on_disk_before_they_are_printed(
    folder, text, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cannot_be_told(*_: object) -> str:
        raise UnicodeEncodeError("latin-1", "да", 0, 2, "ordinal not in range(256)")

    monkeypatch.setattr(command, "results_tables", cannot_be_told)
    with pytest.raises(UnicodeEncodeError):
        main([folder, "--text", text, "--window", "8", "--text-tokens", "20", "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "summary.json").is_file()


def test_a_16_bit_model_is_measured_as_a_run_measures_it(folder, text, tmp_path) -> None:
    params, spec = load_pretrained(folder, "bfloat16")
    save_pretrained(tmp_path / "half", params, spec, source=folder)
    found = {}
    for name, dtype in (("default", []), ("keep", ["--dtype", "keep"]), ("float32", ["--dtype", "float32"])):
        flags = ["--text", text, "--window", "8", "--text-tokens", "20", *dtype, "--output", str(tmp_path / name)]
        assert main([str(tmp_path / "half"), *flags]) == 0
        found[name] = read(tmp_path / name)[0]["perplexity"]["value"]
    windows = text_windows(load_text(text, DataConfig()), load_tokenizer(folder), 8, 20)
    measured = perplexity(load_pretrained(tmp_path / "half", None)[0], windows, spec, compute_dtype="bfloat16")
    assert found["default"] == found["keep"] == pytest.approx(measured.value, rel=1e-6)
    assert found["default"] != found["float32"]


def test_adapter_on_a_base_is_worth_what_the_merged_model_is(folder, text, rows, tmp_path) -> None:
    params, spec = load_pretrained(folder)
    tensors = tensors_for(spec, lambda layer, name: 3)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    merged = merge(params, load_adapter(adapter, spec), None)
    save_pretrained(tmp_path / "merged", merged, spec, source=folder)
    flags = ["--text", text, "--window", "8", "--text-tokens", "20", "--tasks", rows, *TEMPLATE]
    flags += ["--compute-dtype", "float32"]
    for name, asked in (
        ("on", [folder, "--adapter", str(adapter)]),
        ("of", [str(tmp_path / "merged")]),
        ("base", [folder]),
    ):
        assert main([*asked, *flags, "--output", str(tmp_path / name)]) == 0
    (on, on_rows), (of, of_rows), (base, _) = (read(tmp_path / name) for name in ("on", "of", "base"))
    assert on["perplexity"]["value"] == pytest.approx(of["perplexity"]["value"], rel=1e-5)
    assert on["perplexity"]["value"] != pytest.approx(base["perplexity"]["value"], rel=1e-3)
    for mine, theirs in zip(on_rows, of_rows, strict=True):
        assert mine["scores"] == pytest.approx(theirs["scores"], rel=1e-4)


def test_adapter_of_another_model_is_refused_in_one_line(folder, text, tmp_path, capsys) -> None:
    _, spec = load_pretrained(folder)
    adapter = write_adapter(tmp_path / "adapter", tensors_for(spec, lambda layer, name: 3), use_dora=True)
    assert main([folder, "--text", text, "--adapter", str(adapter)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "option use_dora = true is not supported" in error


def test_one_window_of_text_has_a_perplexity_without_an_interval(folder, text, tmp_path, capsys) -> None:
    flags = ["--window", "32", "--text-tokens", "20", "--output", str(tmp_path / "out")]
    assert main([folder, "--text", text, *flags]) == 0
    found = read(tmp_path / "out")[0]["perplexity"]
    assert (found["windows"], found["interval"]) == (1, None)
    assert f"| {found['value']:.3f} | 19 | 1 |" in capsys.readouterr().out


def test_questions_on_one_text_are_one_group_in_the_files_and_the_legend(folder, tmp_path, capsys) -> None:
    twice = [{"q": q, "a": a} for q, a in (("old", "yes"), ("skin", "no"), ("old", "no"))]
    flags = ["--tasks", write(tmp_path / "twice.jsonl", twice), *TEMPLATE, "--output", str(tmp_path / "out")]
    assert main([folder, *flags]) == 0
    summary, records = read(tmp_path / "out")
    assert (summary["tasks"]["twice"]["groups"], [record["group"] for record in records]) == (2, [0, 1, 0])
    assert "over rows; of twice over groups of rows that share a text]" in capsys.readouterr().out


def test_shortened_rows_are_counted_in_the_files_and_below_the_table(folder, tmp_path, capsys) -> None:
    long = [{"q": " ".join(["old", *["fever"] * words]), "a": a} for words, a in ((29, "yes"), (3, "no"))]
    flags = ["--tasks", write(tmp_path / "long.jsonl", long), *TEMPLATE, "--context", "q", "--max-length", "20"]
    assert main([folder, *flags, "--output", str(tmp_path / "out")]) == 0
    found = read(tmp_path / "out")[0]["tasks"]["long"]
    kept = sum(len(record["prompt"]) - len(" ?") for record in read(tmp_path / "out")[1])
    assert (found["shortened"], found["context_kept"]) == (1, kept / sum(len(row["q"]) for row in long))
    assert f"long: 1 of 2 rows shortened to fit; {100 * found['context_kept']:.1f} %" in capsys.readouterr().out


def test_rows_limits_the_rows_of_every_task(folder, rows, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copy(rows, tmp_path / "again.jsonl")
    assert main([folder, "--tasks", rows, str(other), *TEMPLATE, "--rows", "2"]) == 0
    printed = capsys.readouterr().out
    assert "| triage | 2 |" in printed and "| again | 2 |" in printed


def test_sampled_answers_have_a_deviation_over_runs(folder, rows, monkeypatch, tmp_path, capsys) -> None:
    says(monkeypatch, "yes", "no", "?")
    flags = ["--protocol", "sampled", "--runs", "5", "--output", str(tmp_path / "out")]
    assert main([folder, "--tasks", rows, *TEMPLATE, *flags]) == 0
    summary, records = read(tmp_path / "out")
    task = summary["tasks"]["triage"]
    assert (len(records), len(task["accuracy_runs"])) == (15, 5)
    printed = capsys.readouterr().out
    assert f" {100 * task['accuracy']:.2f} ± {100 * task['accuracy_std']:.2f} [" in printed
    assert "| 33.33 |" in printed
    assert "Protocol sampled (5 runs)" in printed


def test_a_flag_of_another_protocol_is_warned_of(folder, rows, monkeypatch) -> None:
    says(monkeypatch, "yes")
    flags = ["--protocol", "greedy", "--runs", "5", "--normalize", "sum"]
    with pytest.warns(FallbackWarning) as told:
        assert main([folder, "--tasks", rows, *TEMPLATE, *flags]) == 0
    assert {str(warning.message) for warning in told} >= {
        "--runs has no effect without --protocol sampled",
        "--normalize has no effect without --protocol likelihood",
    }


def test_what_is_left_of_a_dense_model(folder, rows, monkeypatch, tmp_path, capsys) -> None:
    dense, sparse = str(tmp_path / "dense"), str(tmp_path / "sparse")
    flags = [folder, "--tasks", rows, *TEMPLATE, "--protocol", "greedy"]
    says(monkeypatch, "yes")
    assert main([*flags, "--output", dense]) == 0
    says(monkeypatch, "no")
    assert main([*flags, "--output", sparse, "--relative-to", dense]) == 0
    # Accuracy 1/3 of 2/3, macro-F1 1/4 of 4/10; the dense model is wrong in all rows of one resample in 27.
    assert f"\n\nRel. 56.25 % of {dense}" in capsys.readouterr().out
    assert read(tmp_path / "sparse")[0]["relative"]["value"] == pytest.approx(56.25)
    assert (tmp_path / "sparse" / "results.md").read_text().strip().endswith(dense)

    assert main([*flags, "--rows", "2", "--relative-to", dense]) == 2
    assert "triage has other rows or prompts (3 rows there, 2 here)" in capsys.readouterr().err
    assert main([*flags, "--output", dense, "--relative-to", dense]) == 2
    assert "is what --relative-to compares with" in capsys.readouterr().err


@pytest.fixture
def run(folder, rows, tmp_path) -> pathlib.Path:
    """A run's folder, whose settings name the rows and how to read them."""
    shutil.copytree(folder, tmp_path / "run" / "export")
    data = DataConfig("own.jsonl", template="{q} . => {a}", root=str(tmp_path), format="alpaca", test=("triage.jsonl",))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(Config(data=data)))
    return tmp_path / "run"


def test_a_run_gives_its_tasks_and_data_settings_and_flags_override_them(run, tmp_path) -> None:
    assert main([str(run), "--format", "plain", "--output", str(tmp_path / "out")]) == 0
    summary, records = read(tmp_path / "out")
    assert records[0]["prompt"] == "fever cough ."
    assert (summary["arguments"]["template"], summary["arguments"]["format"]) == ("{q} . => {a}", "plain")


def test_the_export_of_a_run_by_itself_says_that_its_settings_do_not_hold(run, rows, tmp_path, capsys) -> None:
    asked = ("--tasks", rows, *TEMPLATE, "--output")
    assert main([str(run / "export"), *asked, str(tmp_path / "of_export")]) == 0
    assert f"{run}/export: the data settings of its run do not hold" in capsys.readouterr().err
    assert main([str(run), *asked, str(tmp_path / "of_run")]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_run_gives_its_windows_and_flags_override_them(run, text, tmp_path) -> None:
    settings = EvalConfig(window=8, text_tokens=20)
    data = DataConfig("own.jsonl", text=text, max_length=48)
    (run / "config.yaml").write_text(to_yaml(Config(data=data, eval=settings)))
    assert main([str(run), "--output", str(tmp_path / "out")]) == 0
    summary, _ = read(tmp_path / "out")
    assert (summary["perplexity"]["tokens"], summary["perplexity"]["windows"]) == (17, 3)
    asked = summary["arguments"]
    assert (asked["window"], asked["text_tokens"], asked["max_length"]) == (8, 20, 48)
    assert main([str(run), "--window", "16", "--text-tokens", "32", "--output", str(tmp_path / "other")]) == 0
    assert read(tmp_path / "other")[0]["perplexity"]["windows"] == 2


def test_a_run_gives_the_type_of_its_products_and_a_flag_overrides_it(run, text, folder, tmp_path) -> None:
    def measured(path: str, *flags: str) -> tuple[str, float]:
        assert main([path, "--text", text, "--window", "8", *flags, "--output", str(tmp_path / "out")]) == 0
        summary, _ = read(tmp_path / "out")
        return summary["arguments"]["compute_dtype"], summary["perplexity"]["value"]

    (run / "config.yaml").write_text(to_yaml(Config(model=ModelConfig(compute_dtype="float32"))))
    (narrow, low), (wide, high) = measured(folder), measured(folder, "--compute-dtype", "float32")
    assert (narrow, wide) == ("bfloat16", "float32") and low != high
    assert measured(str(run)) == (wide, high)
    assert measured(str(run), "--compute-dtype", "bfloat16") == (narrow, low)


def test_without_a_run_rows_may_be_as_long_as_the_model_reads(folder, rows, tmp_path) -> None:
    assert main([folder, "--tasks", rows, *TEMPLATE, "--output", str(tmp_path / "out")]) == 0
    assert read(tmp_path / "out")[0]["arguments"]["max_length"] == 64


def test_a_run_on_a_mix_gives_its_tasks_whatever_its_text(run, rows, text, tmp_path) -> None:
    part = f"{{train: {rows}, test: {rows}, template: '{TEMPLATE[1]}'}}"
    (tmp_path / "mix.yaml").write_text(f"tasks:\n  own: {part}\n")
    data = DataConfig(train=str(tmp_path / "mix.yaml"), text=text)
    (run / "config.yaml").write_text(to_yaml(Config(data=data)))
    assert main([str(run), "--window", "8", "--output", str(tmp_path / "out")]) == 0
    summary, _ = read(tmp_path / "out")
    assert list(summary["tasks"]) == ["own"] and summary["perplexity"]["tokens"] > 0


def test_an_interrupted_evaluation_leaves_with_code_130_and_no_files(
    folder, rows, monkeypatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("efx_jax.evaluation.__main__.evaluate_task", interrupt)
    assert main([folder, "--tasks", rows, *TEMPLATE, "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "triage: 3 rows ...\ninterrupted; nothing is written\n"
    assert not (tmp_path / "out").exists()


def test_a_dense_score_of_zero_is_refused_before_the_weights(folder, rows, monkeypatch, tmp_path, capsys) -> None:
    flags = [folder, "--tasks", rows, *TEMPLATE, "--protocol", "greedy"]
    says(monkeypatch, "?")
    assert main([*flags, "--output", str(tmp_path / "dense")]) == 0
    capsys.readouterr()
    monkeypatch.setattr("efx_jax.evaluation.__main__.load_pretrained", None)
    assert main([*flags, "--relative-to", str(tmp_path / "dense")]) == 2
    assert "the dense model's accuracy on triage is 0" in capsys.readouterr().err


def test_a_run_without_tasks_of_its_own_asks_for_some(run, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text(to_yaml(Config(data=DataConfig(train="own.jsonl"))))
    assert main([str(run)]) == 2
    assert "a run without tasks or text of its own; give --tasks or --text" in capsys.readouterr().err
    assert main([str(run), "--tasks", "a.jsonl", "--output", str(run)]) == 2
    assert "is a run, whose summary.json would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--text", "missing.jsonl", "--window", "8"], "missing.jsonl: no such file"),
        (["--text", "TEXT", "--bundle", "a", "--adapter", "b"], "--adapter: expected none beside --bundle"),
        (["--tasks", "ROWS"], "no column 'text'"),
        (["--text", "TEXT", "--window", "1"], "--window"),
        (["--tasks", "hqs,billsum"], "--tasks hqs,billsum: expected names separated by blanks; write hqs billsum"),
        (["--tasks", "ROWS", "--template", "{q} {a}"], "--template '{q} {a}': expected"),
        (["--tasks", "ROWS", *TEMPLATE, "--context", "a"], "--context 'a': expected"),
        (["--tasks", "ROWS", *TEMPLATE, "--context", "q", "--max-length", "3"], "raise --max-length"),
        (["--tasks", "ROWS", *TEMPLATE, "--root", "nowhere"], "--root: no folder nowhere;"),
        (["--text", "TEXT", "--window", "65"], "--window: expected at most"),
        (["--tasks", "ROWS", *TEMPLATE, "--text-tokens", "9"], "--text-tokens: --tasks alone measures no perplexity"),
        (["--tasks", "ROWS", "--max-length", "65"], "--max-length: expected at most the model's context of 64 tokens"),
        (["--tasks", "ROWS", *TEMPLATE, "--relative-to", "nothing"], "nothing/summary.json: no such file"),
        (["--tasks", "ROWS", *TEMPLATE, "--output", "TEXT"], "text.jsonl: is not a folder"),
        (["--tasks", "ROWS", "ROWS", *TEMPLATE], "triage twice"),
    ],
)
def test_bad_input_is_one_line_and_code_2_before_the_weights(
    folder, text, rows, flags, part, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("efx_jax.evaluation.__main__.load_pretrained", None)
    named = {"TEXT": text, "ROWS": rows}
    assert main([folder, *(named.get(flag, flag) for flag in flags)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert part in captured.err


def test_a_run_on_a_mix_that_is_not_here_says_so(run, monkeypatch, tmp_path, capsys) -> None:
    (run / "config.yaml").write_text(to_yaml(Config(data=DataConfig(train="clinic.yaml"))))
    monkeypatch.chdir(tmp_path)
    assert main([str(run)]) == 2
    assert f"clinic.yaml: the mix of the run {run} is not here; evaluate it from" in capsys.readouterr().err


def test_a_missing_checkpoint_is_one_line_and_code_2(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing" / "here")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--rowz", "3"], ["--runs", "0"], ["--rows", "x"], ["--protocol", "guess"]])
def test_a_wrong_flag_is_one_line(flags, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["model", *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1 and flags[0] in said and "_number" not in said


def test_a_dense_evaluation_in_another_dtype_is_warned_of(tmp_path: pathlib.Path) -> None:
    (tmp_path / "summary.json").write_text('{"arguments": {"compute_dtype": "bfloat16"}}')
    with pytest.warns(UserWarning, match="was evaluated with --compute-dtype bfloat16, here it is float32"):
        warn_of_another_dtype(tmp_path, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_another_dtype(tmp_path, "bfloat16")
        # Evaluations of before do not all say it.
        (tmp_path / "summary.json").write_text("{}")
        warn_of_another_dtype(tmp_path, "float32")
