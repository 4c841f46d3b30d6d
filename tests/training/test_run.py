"""A run on the user's own model and rows: what it writes, and that the parts of it agree."""

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert_weights
import efx_jax
import efx_jax.training.run as run_module
from efx_jax.config_io import from_yaml
from efx_jax.model.spec import LINEARS, ModelSpec
from tests.tiny import TEST_ROWS

TOKENS = np.asarray([[0, 3, 4, 9, 1], [0, 7, 8, 11, 12]], np.int32)
METRICS = {"step", "tokens", "loss", "entropy", "learning_rate", "grad_norm", "sparsity", "tokens_per_second"}
logits = jax.jit(efx_jax.forward, static_argnames="spec")
MetricsOf = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(params=["paper", "official", "efx"])
def run(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_run")
    return folder


def load(path: Path) -> tuple[dict[str, Any], ModelSpec]:
    params, spec = efx_jax.load_pretrained(path, dtype=None)
    return params, spec


def zeros(run: Path) -> dict[str, np.ndarray]:
    """Name -> bool `[L,O,I]`, where the exported linears are exactly zero."""
    layers = load(run / "export")[0]["layers"]
    return {name: np.asarray(layers[name]) == 0 for name in LINEARS}


def masked_model(run: Path, base: Path) -> tuple[dict[str, Any], efx_jax.Adapters, dict[str, Any], ModelSpec]:
    """The last checkpoint as Orbax reads it without being told anything, over the base where it was not moved."""
    config = from_yaml((run / "config.yaml").read_text())
    steps = [int(path.name) for path in (run / "checkpoints").iterdir()]
    tree = ocp.StandardCheckpointer().restore(run / "checkpoints" / str(max(steps)) / "state")
    params, spec = load(base)
    if "layers" in tree:
        params = {**params, "layers": tree["layers"]}
    saved = tree["train"]["adapters"]
    adapters = efx_jax.Adapters(saved["lora_a"], saved["lora_b"], config.lora.alpha / config.lora.rank)
    return params, adapters, tree["masks"], spec


def test_it_leaves_the_promised_files(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    read = {"config.yaml", "metrics.jsonl", "summary.json", "samples.jsonl", "report.html"}
    assert names == read | {"checkpoints", "export"}
    exported = {path.name for path in (run / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= exported


def test_samples_hold_every_measured_models_answer_to_every_row(run: Path) -> None:
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    results = json.loads((run / "summary.json").read_text())["results"]
    assert [(row["prompt"], row["gold"]) for row in samples] == [(prompt, answer) for prompt, answer in TEST_ROWS]
    for model, found in results.items():
        right = sum(row["answers"][model]["prediction"] == row["gold"] for row in samples)
        assert right / len(samples) == pytest.approx(found["tasks"]["test"]["accuracy"])
        assert "samples" not in found


def test_report_and_card_show_what_was_measured(run: Path) -> None:
    results = json.loads((run / "summary.json").read_text())["results"]
    page, card = ((run / name).read_text() for name in ("report.html", "export/README.md"))
    for found in results.values():
        value = f"{found['perplexity']['value']:.2f}"
        assert value in page and value in card
    assert str(run) not in card


def test_what_cannot_be_described_is_not_lost(
    launch, efx_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_of
) -> None:
    run = tmp_path / "run"
    shutil.copytree(efx_run, run)
    (run / "report.html").unlink()
    (run / "export" / "README.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(run_module.report, "report_page", lambda record: 1 / 0)
        with pytest.warns(UserWarning, match="report.html is not written"):
            launch(run, "--preset", "efx")
    assert not (run / "report.html").exists() and (run / "export" / "README.md").exists()
    launch(run, "--preset", "efx")
    assert (run / "report.html").exists()
    assert files_of(run / "export") == files_of(efx_run / "export")


def test_metrics_have_a_line_per_step_with_the_promised_keys(run: Path, metrics_of: MetricsOf) -> None:
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # The preset efx has a teacher, from its event after the first step on.
    taught = [{"divergence"} if run.name == "efx" and row["step"] > 1 else set() for row in rows]
    assert [set(row) for row in rows] == [METRICS | extra for extra in taught]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    # Linear decay over six steps; `tokens` counts from the start of the run.
    np.testing.assert_allclose([row["learning_rate"] for row in rows], 1e-2 * (1 - np.arange(6) / 6), rtol=1e-6)
    assert all(4 <= late["tokens"] - early["tokens"] <= 16 for early, late in itertools.pairwise(rows))


def test_training_lowers_the_loss(run: Path, metrics_of: MetricsOf) -> None:
    losses = [row["loss"] for row in metrics_of(run)]
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.01


def test_sparsity_in_the_metrics_starts_with_the_first_event(
    paper_run: Path, efx_run: Path, metrics_of: MetricsOf
) -> None:
    # A line describes its step, which an event follows: paper at 2, 4, 6, efx at 1.
    assert [row["sparsity"] for row in metrics_of(paper_run)] == [0, 0, 0.5, 0.5, 0.5, 0.5]
    found = [row["sparsity"] for row in metrics_of(efx_run)]
    np.testing.assert_allclose(found, [0, 0.5, 0.5, 0.5, 0.5, 0.5], atol=1e-3)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_every_row_of_the_export_has_exactly_its_zeros(preset: str, request: pytest.FixtureRequest) -> None:
    for name, found in zeros(request.getfixturevalue(f"{preset}_run")).items():
        assert (found.sum(axis=-1) == found.shape[-1] // 2).all(), name


def test_the_export_says_what_is_zero_in_it(run: Path) -> None:
    report = json.loads((run / "export" / "efx_sparsity.json").read_text())
    assert (report["pattern"], report["sparsity_asked"]) == ("unstructured", 0.5)
    found = zeros(run)
    assert report["linears"]["zeros"] == sum(int(gone.sum()) for gone in found.values())
    down = report["tensors"]["model.layers.1.mlp.down_proj.weight"]
    gone = found["down_proj"][1]
    assert (down["zeros"], down["sparsity"]) == (gone.sum(), pytest.approx(gone.mean(), abs=1e-6))
    kept = np.packbits(~found["down_proj"][1], axis=-1, bitorder="little")
    assert down["mask_sha256"] == hashlib.sha256(kept.tobytes()).hexdigest()


def test_one_threshold_is_exact_in_total_and_bounded_by_matrix_and_row(efx_run: Path) -> None:
    every = zeros(efx_run)
    assert sum(found.sum() for found in every.values()) == sum(found.size for found in every.values()) // 2
    for name, found in every.items():
        width, shares = found.shape[-1], found.mean(axis=(1, 2), keepdims=True)
        # Matrices within 0.3 of the whole, rows within 0.3 of their matrix, each to an entry.
        assert (np.abs(shares - 0.5) <= 0.3 + 1 / found[0].size).all(), name
        assert (np.abs(found.mean(axis=-1, keepdims=True) - shares) <= 0.3 + 1 / width).all(), name
    assert len({round(float(share), 2) for found in every.values() for share in found.mean(axis=(1, 2))}) > 1


def test_the_summary_tells_what_happened(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert {"base", "sparse expert"} <= set(summary["results"])
    for found in summary["results"].values():
        assert found["perplexity"]["value"] > 1 and found["perplexity"]["interval"] is None  # of a single window
        assert 0 <= found["tasks"]["test"]["accuracy"] <= 1
        assert found["tasks"]["test"]["rows"] == 3
    for name, found in zeros(run).items():
        np.testing.assert_allclose(summary["sparsity"][name], found.mean(axis=(1, 2)))
    assert set(summary["sparsity"]) == set(LINEARS)
    assert {"load", "evaluate base", "train", "prune", "checkpoint", "export", "evaluate export"} <= set(
        summary["seconds"]
    )
    assert summary["peak_memory_mib"] > 50
    assert {"python", "jax", "optax", "orbax-checkpoint"} <= set(summary["versions"])
    assert (summary["seed"], summary["steps"]) == (0, 6)
    assert summary["events"][-1]["last"] is True


def test_the_dense_adapter_is_measured_before_a_single_event(efx_run: Path, paper_run: Path) -> None:
    results = [json.loads((run / "summary.json").read_text())["results"] for run in (efx_run, paper_run)]
    assert [[name for name in found if name.startswith("dense LoRA")] for found in results] == [
        ["dense LoRA, step 1"],
        [],
    ]


def test_the_resolved_settings_are_beside_the_results(paper_run: Path) -> None:
    config = from_yaml((paper_run / "config.yaml").read_text())
    assert (config.prune.recovery, config.prune.ema, config.lora.rank, config.train.steps) == ("pbs", 0.5, 2, 6)


def test_the_export_is_the_masked_model_with_its_adapters(run: Path, tiny_folder: Path) -> None:
    params, adapters, masks, spec = masked_model(run, tiny_folder)
    expected = logits(params, jnp.asarray(TOKENS), spec, adapters, masks)
    exported, exported_spec = load(run / "export")
    assert exported_spec == spec
    np.testing.assert_allclose(logits(exported, jnp.asarray(TOKENS), spec), expected, rtol=1e-4, atol=1e-6)
    base = logits(load(tiny_folder)[0], jnp.asarray(TOKENS), spec)
    assert float(jnp.max(jnp.abs(expected - base))) > 1e-2


def test_transformers_opens_the_export_and_computes_the_same(run: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    params, spec = load(run / "export")
    found = logits(params, jnp.asarray(TOKENS), spec)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert transformers.AutoTokenizer.from_pretrained(run / "export")("fever lung")["input_ids"] == [3, 9]


def test_a_model_that_was_taught_in_chats_stops_where_its_answers_end(
    launch, tiny_folder: Path, tmp_path: Path
) -> None:
    """The template's end of a turn, "chronic" here, is not the base's end of sequence; a bundle brings it along."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} chronic {% endfor %}")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = ["chronic"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    run = launch(tmp_path / "run", "--model.path", str(base), "--data.format", "chat", "--train.steps", "1")
    end = efx_jax.load_tokenizer(base).convert_tokens_to_ids("chronic")
    config, stops = (json.loads((run / "export" / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert stops["eos_token_id"][-1] == end and config["eos_token_id"] != end
    convert_weights.main(["bundle", str(run), str(tmp_path / "bundle")])
    convert_weights.main(["apply", str(base), str(tmp_path / "bundle"), str(tmp_path / "again")])
    again = tmp_path / "again" / "generation_config.json"
    assert json.loads(again.read_text()) == stops


@pytest.mark.slow
def test_what_was_measured_of_an_export_goes_with_it(launch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch(run, "--preset", "paper")
    measured = run / "evaluations" / "text" / "summary.json"
    measured.parent.mkdir(parents=True)
    for is_gone in (False, True):
        measured.touch()
        if is_gone:
            shutil.rmtree(run / "export")
        (run / "summary.json").unlink()
        launch(run, "--preset", "paper")
        assert (run / "export").is_dir() and measured.exists() != is_gone


def test_gram_surgery_on_a_cubic_ramp_over_whole_matrices(launch, tmp_path: Path, metrics_of: MetricsOf) -> None:
    flags = "--preset paper --prune.recovery gram_pbs --prune.schedule cubic --prune.events 3 --prune.ramp 0 1"
    flags += " --prune.group matrix --prune.score foresight_gated --prune.mask_forward ste --data.batching packing"
    run = launch(tmp_path / "run", *flags.split())
    # 0.5 (1 - (1 - t)^3) after steps 2, 4 and 6.
    found = [row["sparsity"] for row in metrics_of(run)]
    np.testing.assert_allclose(found, [0, 0] + [0.5 * 19 / 27] * 2 + [0.5 * 26 / 27] * 2, atol=5e-3)
    for name, gone in zeros(run).items():
        assert (gone.sum(axis=(1, 2)) == gone[0].size // 2).all(), name


def test_two_of_four_refitted_block_by_block_and_merged_at_each_event(launch, tmp_path: Path) -> None:
    flags = "--preset paper --prune.group 2:4 --prune.recovery admm --prune.sequential --prune.merge_each_event"
    run = launch(tmp_path / "run", *flags.split(), "--prune.schedule", "fractions", "--prune.fractions", "0.3", "0.7")
    for name, gone in zeros(run).items():
        assert (gone.reshape(*gone.shape[:2], -1, 4).sum(axis=-1) == 2).all(), name
    assert json.loads((run / "export" / "efx_sparsity.json").read_text())["pattern"] == "2:4"


def test_units_change_places_before_two_of_four_are_pruned(launch, tmp_path: Path) -> None:
    """Where next to nothing is learned, what is not pruned is the base's own, in another order."""
    flags = "--preset paper --prune.group 2:4 --prune.score sparsegpt --prune.recovery obs --prune.ema 1"
    flags += " --prune.targets down_proj o_proj --prune.schedule fractions --prune.fractions 0"
    flags += " --train.learning_rate 1e-20 --train.steps 1"
    as_it_is = launch(tmp_path / "as_it_is", *flags.split())
    permuted = launch(tmp_path / "permuted", *flags.split(), "--prune.permute")
    (base, _), (other, spec) = (efx_jax.load_pretrained(run / "export", dtype=None) for run in (as_it_is, permuted))
    for name in ("gate_proj", "up_proj", "v_proj"):
        rows, moved = np.asarray(base["layers"][name]), np.asarray(other["layers"][name])
        assert (rows != moved).any(), name
        for layer in range(spec.num_layers):
            assert sorted(map(tuple, rows[layer])) == sorted(map(tuple, moved[layer])), name
    np.testing.assert_array_equal(base["layers"]["q_proj"], other["layers"]["q_proj"])
    for name in ("down_proj", "o_proj"):
        gone = zeros(permuted)[name]
        assert (gone.reshape(*gone.shape[:2], -1, 4).sum(axis=-1) == 2).all(), name


def test_without_sparsity_the_run_is_plain_lora(launch, tmp_path: Path, metrics_of: MetricsOf) -> None:
    run = launch(tmp_path / "run", "--prune.sparsity", "0", "--data.holdout", "0", "--train.steps", "6")
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["results"]) == {"base", "dense expert"}
    assert not any(found.any() for found in zeros(run).values())
    assert {row["sparsity"] for row in metrics_of(run)} == {0}
    assert (summary["events"], "perplexity" in summary["results"]["base"]) == ([], False)


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_loaded(
    launch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "letter.txt").touch()
    monkeypatch.setattr(run_module, "prepare", None)
    launch(tmp_path / "letter.txt" / "run", "--preset", "paper", code=2)
    said = capsys.readouterr().err
    assert (
        said
        == f"train.py: {tmp_path / 'letter.txt'}: is not a folder that can be written into; choose another --output\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
