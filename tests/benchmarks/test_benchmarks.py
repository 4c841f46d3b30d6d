"""Every benchmark but vs_peft runs on a CPU, and its rows hold what a reader compares.

Those that run_all calls, and streaming, need the core dependencies alone. Of tasks only the plan is tested.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tomllib
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import pytest

from efx_jax.model.spec import init_params
from efx_jax.weights.hf import save_pretrained
from tests.tiny import LLAMA

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = str(BENCHMARKS / "tiny")
EARLIER = {"note": "by hand", "rows": [{"name": "another day", "value": 1.0, "unit": "s"}]}
OPTIONAL = ("torch", "transformers", "peft", "datasets", "evaluate", "tokenizers", "gguf", "sklearn")
# What a script measures is of no interest here: its programs need not be fast.
QUICK = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
Row = dict[str, Any]


@pytest.fixture(scope="session")
def core_only(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which everything beyond the core dependencies fails to import."""
    folder = tmp_path_factory.mktemp("absent")
    for name in OPTIONAL:
        (folder / f"{name}.py").write_text("raise ImportError('it is not there')\n")
    return {**QUICK, "PYTHONPATH": os.pathsep.join([str(folder), str(BENCHMARKS.parent)])}


def run(script: str, *flags: str, environment: dict[str, str], code: int = 0) -> list[Row]:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def kept(file: Path) -> dict[str, Row]:
    """The rows of a file by name, after what holds for all of them."""
    rows = json.loads(file.read_text())["rows"]
    for found in rows:
        assert {"name", "value", "unit"} <= set(found)
        assert ("against" in found) == ("ratio" in found)
    return {found["name"]: found for found in rows}


@pytest.mark.exhaustive
def test_training_steps_are_measured_in_every_mode_and_a_missing_peft_is_a_row(
    core_only: dict[str, str], tmp_path: Path
) -> None:
    flags = ("--models", TINY, "--batch", "2", "--length", "16", "--remat", "block", "--repeats", "1", "--together")
    flags += ("--labels", "0.5", "--modes", "plain", "exact", "ste", "frozen", "taught", "text")
    printed = run("train_step", *flags, "--out", str(tmp_path / "rows.json"), environment=core_only)
    rows = kept(tmp_path / "rows.json")
    assert set(rows) == {found["name"] for found in printed if "name" in found}
    plain = rows["step_plain tiny remat block"]
    assert plain["value"] > 0 and plain["compile_seconds"] > 0 and plain["mfu"] is None
    assert plain["tokens_per_second"] == pytest.approx(2 * 16 / plain["value"], rel=0.1)
    assert plain["hfu_of_matmul"] > plain["mfu_of_matmul"] > 0
    for mode in ("exact", "ste", "frozen", "taught", "text"):
        step, memory = rows[f"step_{mode} tiny remat block"], rows[f"memory_{mode} tiny remat block"]
        assert step["against"] == "step_plain" and step["ratio"] > 0
        # A chunk of the teacher's logits beside the model's outweighs the weights of a tiny model.
        assert memory["unit"] == "bytes" and 0.5 < memory["ratio"] < (3 if mode in ("taught", "text") else 2)
    assert rows["matmul tiny"]["unit"] == "TFLOP/s"
    assert "not installed" in rows["step_peft tiny float32 adapters, no checkpointing"]["error"]


def test_events_are_measured_in_their_parts(core_only: dict[str, str], tmp_path: Path) -> None:
    flags = ("--models", TINY, "--rows", "2", "--length", "16", "--repeats", "1", "--recoveries", "none", "gram_pbs")
    run("prune_event", *flags, "--out", str(tmp_path / "rows.json"), environment=core_only)
    rows = kept(tmp_path / "rows.json")
    parts = rows["calibration_none tiny"]["value"] + rows["blocks_none tiny"]["value"]
    assert parts == pytest.approx(rows["event_none tiny"]["value"], abs=2e-4)
    assert rows["event_gram_pbs tiny"]["against"] == "event_none"
    assert rows["event_gram_pbs tiny"]["first_seconds"] > rows["event_gram_pbs tiny"]["value"]


def test_rivals_of_the_selection_mark_the_same_entries(core_only: dict[str, str], tmp_path: Path) -> None:
    flags = ("--shapes", "12x40", "--repeats", "1", "--out", str(tmp_path / "rows.json"))
    run("selection", *flags, environment=core_only)
    rows = kept(tmp_path / "rows.json")
    assert len(rows) == 14
    assert all("error" not in found for found in rows.values())
    assert rows["ours 12x40 row"]["dropped"] == 20 and rows["ours 12x40 matrix"]["dropped"] == 240
    assert rows["argsort 12x40 row"]["against"] == "ours"


def test_one_command_goes_on_after_a_script_that_fails(core_only: dict[str, str], tmp_path: Path) -> None:
    flags = ("--small", "--only", "selection", "attention", "--minutes", "0.001", "--out", str(tmp_path))
    lines = run("run_all", *flags, environment=core_only, code=1)
    assert [line["ended"] for line in lines if "ended" in line] == ["cut off after 0.001 minutes"] * 2


@pytest.mark.parametrize("script", ["selection", "attention"])
def test_one_command_keeps_the_rows_of_every_script(script: str, core_only: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / f"{script}.json").write_text(json.dumps(EARLIER))
    lines = run("run_all", "--small", "--only", script, "--out", str(tmp_path), environment=core_only)
    assert lines[-1]["ended"] == "done"
    rows = kept(tmp_path / f"{script}.json")
    assert set(rows) == {line["name"] for line in lines if "name" in line} | {"another day"}
    assert json.loads((tmp_path / f"{script}.json").read_text())["note"] == EARLIER["note"]
    assert all("error" not in found for found in rows.values())
    if script == "attention":
        assert len(rows) == 1 + 2 * 2 * 2
        found = rows["smollm2_135m packed forward+backward xla"]
        assert found["against"] == "full_mask" and found["ratio"] > 0 and found["heads"] == 9
        assert "ratio" not in rows["smollm2_135m plain forward full_mask"]


def test_an_attention_that_fails_is_a_row_without_a_ratio(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    attention, keep = importlib.import_module("attention"), importlib.import_module("rows").keep
    asked = Namespace(batch=1, length=8, dtype="float32", repeats=1)
    keep(
        str(tmp_path / "rows.json"),
        [attention.measure("a case", (2, 1, 4), "xla", lambda q, k, v: q @ k, False, {}, asked)],
    )
    (found,) = kept(tmp_path / "rows.json").values()
    assert found["name"] == "a case" and found["value"] is None and "TypeError" in found["error"]
    assert "a case" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_conversion_has_its_memory_and_its_time(
    core_only: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of them; those of tests/weights/test_streaming.py are measured there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    streaming = importlib.import_module("streaming")
    monkeypatch.setenv("PYTHONPATH", core_only["PYTHONPATH"])
    monkeypatch.setattr(streaming, "CASES", {case: streaming.CASES[case] for case in ("load", "save", "pack")})
    flags = ("--layers", "2", "--width", "64", "--out", str(tmp_path / "rows.json"))
    monkeypatch.setattr(sys, "argv", ["streaming.py", *flags])
    streaming.main()
    rows = kept(tmp_path / "rows.json")
    assert set(rows) == {f"{case}_{what}" for case in ("load", "save", "pack") for what in ("memory", "time")}
    assert all(found["value"] > 0 and found["layers"] == 2 for name, found in rows.items() if name.endswith("time"))
    assert rows["load_memory"]["against"] == "2 x largest stacked + 500 MiB"
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_one_shot_adds_to_the_rows_of_its_file(byte_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(EARLIER))
    (tmp_path / "text.txt").write_text("fever and a mild cough\n" * 80)
    flags = ("--data", str(tmp_path / "text.txt"), "--model", str(byte_folder), "--calibration", "1", "--test", "1")
    flags += ("--sparsity", "0.5", "0.75", "--only", "magnitude", "--out", str(tmp_path / "rows.json"))
    environment = {**QUICK, "PYTHONPATH": str(BENCHMARKS.parent)}
    run("one_shot", *flags, environment=environment)
    rows = kept(tmp_path / "rows.json")
    assert set(rows) == {"another day", "dense", "magnitude, row", "magnitude, row, 75 %"}
    assert json.loads((tmp_path / "rows.json").read_text())["note"] == EARLIER["note"]
    found = rows["magnitude, row"]
    assert found["against"] == "dense" and found["ratio"] == pytest.approx(
        found["value"] / rows["dense"]["value"], rel=1e-3
    )
    assert str(tmp_path) not in found["command"]


def test_whoever_has_the_sources_of_a_release_has_what_its_tests_read() -> None:
    root = BENCHMARKS.parent
    targets = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert {"/tests", "/benchmarks", "/configs", "/docs", "/train.py"} <= set(targets["sdist"]["include"])


def test_a_step_that_does_not_fit_is_a_row_and_is_tried_with_fewer_sequences(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    train_step = importlib.import_module("train_step")
    tried = []

    def run_case(script: str, case: Row, seconds: float) -> Row:
        tried.append(case["micro_batch"])
        return {"error": "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"} if case["micro_batch"] > 4 else {"ok": 1}

    monkeypatch.setattr(train_step, "run_case", run_case)
    out = str(tmp_path / "rows.json")
    arguments = Namespace(micro_batch=0, batch=16, length=8, repeats=1, labels=1.0, limit=1.0, out=out)
    assert train_step.run_ours(TINY, ["exact"], "block", arguments) == {"micro_batch": 4, "ok": 1}
    assert tried == [16, 8, 4]
    assert set(kept(Path(out))) == {f"no_fit_exact tiny remat block {rows} sequences" for rows in (16, 8)}
    assert "RESOURCE_EXHAUSTED" in capsys.readouterr().out


def test_a_case_whose_process_dies_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cases = importlib.import_module("cases")
    assert cases.run_case("no_such_script.py", {}, 30) == {"error": "its process ended with code 2"}
    assert cases.out_of_memory({"error": "its process ended with code -9"})
    assert not cases.out_of_memory({"error": "ValueError: no such shape"})


@pytest.fixture
def byte_folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of a random LLaMA that reads bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bare = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder = tmp_path / "bytes"
    spec = dataclasses.replace(LLAMA, vocab_size=256, max_position_embeddings=1024)
    save_pretrained(folder, init_params(jax.random.key(0), spec), spec)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(folder)
    return folder


def test_evaluation_is_measured_beside_transformers(byte_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    sizes = ("--rows", "3", "--length", "12", "--hypotheses", "2", "--batch", "2", "--new-tokens", "3")
    sizes += ("--prompts", "3", "--repeats", "1")
    out = str(tmp_path / "rows.json")
    environment = {**QUICK, "PYTHONPATH": str(BENCHMARKS.parent)}
    run("evaluation", "--model", str(byte_folder), *sizes, "--out", out, environment=environment)
    rows = kept(Path(out))
    assert rows["greedy_same_tokens float32"]["value"] == 1
    for name in ("score_rows", "score_contracts", "generate_greedy", "generate_sampled"):
        found = rows[f"{name} bfloat16"]
        assert found["against"] == f"{name} bfloat16 transformers" and found["ratio"] > 0
    assert rows["score_contracts float32"]["most_nats_apart"] < 1e-4


def test_the_table_of_tasks_computes_only_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tasks = importlib.import_module("tasks")
    asked: list[str] = []

    def work(command: list[str], log: Path) -> None:
        asked.append(" ".join(command))
        log.with_suffix("").mkdir()
        trained = {"sparsity": {}, "tokens": 7, "seconds": {"train": 2.0}, "peak_memory_mib": 3.0}
        measured = {"seconds": {"hqs": 1.0}, "perplexity": None, "tasks": {"hqs": {}}, "relative": None}
        summary = trained if command[0] == "train.py" else measured
        (log.with_suffix("") / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(tasks, "run", work)
    words = ["--root", "data", "--work", str(tmp_path), "--only", "health", "--out", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["tasks.py", *words, "--train", "--lora.rank", "16"])
    tasks.main()
    assert len(asked) == 3 + 2 * 4
    assert sum("--lora.rank 16" in line for line in asked) == 3
    assert "--prune.sparsity 0" in asked[0] and "--preset paper" in asked[1]
    assert "health_dense --tasks pubmedqa" in asked[3] and "--relative-to" not in asked[3]
    assert sum("--relative-to" in line and "dense_likelihood" in line for line in asked) == 3
    assert [sum(f"--protocol {name}" in line for line in asked) for name in ("likelihood", "sampled")] == [4, 4]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 8 and ("tokens" in rows[1]) == (rows[1]["name"] != "health base likelihood")
    tasks.main()
    assert len(asked) == 3 + 2 * 4
