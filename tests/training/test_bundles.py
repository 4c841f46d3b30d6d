"""A run's bundle on its base is the run's export, and nothing else passes for either."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import efx_jax
from convert_weights import main
from efx_jax.analysis.outcome import run_outcome
from efx_jax.errors import InputError
from efx_jax.evaluation.__main__ import main as evaluate
from efx_jax.weights.bundle import apply_bundle, bundle_params, content_sha256, open_bundle
from efx_jax.weights.bundle_write import write_bundle
from efx_jax.weights.hf import load_pretrained, open_checkpoint, save_pretrained
from efx_jax.weights.sealed import file_table, read_sealed, write_sealed

# B on a frozen base, a base merged with its adapters at every event, and a base refitted by ADMM.
pytestmark = pytest.mark.slow

RUNS = ("paper_run", "official_run", "efx_run")
TOKENS = jnp.asarray([[3, 5, 9, 12], [4, 4, 7, 1]])
Files = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name of a run -> its folder and its bundle."""
    folder = tmp_path_factory.mktemp("bundles")
    runs = {name: request.getfixturevalue(name) for name in RUNS}
    for name, run in runs.items():
        write_bundle(run_outcome(run), folder / name)
    return {name: (run, folder / name) for name, run in runs.items()}


@pytest.mark.parametrize("name", RUNS)
def test_base_and_bundle_are_the_export_bit_for_bit(
    name: str, bundles: dict[str, tuple[Path, Path]], tiny_folder: Path, tmp_path: Path, files_of: Files
) -> None:
    run, bundle = bundles[name]
    assert (bundle / "moved.safetensors").exists() == (name != "paper_run")
    assert main(["apply", str(tiny_folder), str(bundle), str(tmp_path / "again")]) == 0
    assert files_of(tmp_path / "again") == files_of(run / "export")


def test_units_in_another_order_come_with_the_bundle(
    launch: Callable[..., Path], tiny_folder: Path, tmp_path: Path, files_of: Files
) -> None:
    """Of gate and up too, which nothing is pruned from; of two events, the second one only a mask."""
    flags = "--preset paper --prune.group 2:4 --prune.recovery admm --prune.permute --prune.targets down_proj"
    flags += " --prune.schedule fractions --prune.fractions 0.3 0.7 --prune.plain_last_event"
    run = launch(tmp_path / "run", *flags.split())
    write_bundle(run_outcome(run), tmp_path / "bundle")
    apply_bundle(tiny_folder, tmp_path / "bundle", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(run / "export")


def test_the_command_prints_what_every_part_weighs(
    paper_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", str(paper_run), str(tmp_path / "bundle")]) == 0
    lines = dict(line.rsplit("MB", 1)[0].rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[1:])
    weights = load_pretrained(paper_run / "export")[0]["layers"]
    linears = [leaf for name, leaf in weights.items() if name.endswith("_proj")]
    bits = sum(leaf.shape[0] * leaf.shape[1] * -(-leaf.shape[2] // 8) for leaf in linears)
    assert 0 <= float(lines["masks.safetensors"]) * 1e6 - bits < 1500
    size = sum(path.stat().st_size for path in (tmp_path / "bundle").rglob("*") if path.is_file())
    assert float(lines["the bundle"]) == pytest.approx(size / 1e6, abs=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_the_arrays_of_a_bundle_compute_what_the_export_does(
    name: str, bundles: dict[str, tuple[Path, Path]], tiny_folder: Path
) -> None:
    run, bundle = bundles[name]
    params, spec = efx_jax.load_pretrained(tiny_folder, dtype=None)
    adapters, masks, moved = efx_jax.load_bundle(bundle)
    found = efx_jax.forward({**params, "layers": params["layers"] | moved}, TOKENS, spec, adapters, masks)
    expected = efx_jax.forward(efx_jax.load_pretrained(run / "export")[0], TOKENS, spec)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(found - efx_jax.forward(params, TOKENS, spec)).max() > 1e-4


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_expert_on_a_base_in_memory_is_its_export_loaded(
    dtype: str | None, bundles: dict[str, tuple[Path, Path]], tiny_folder: Path
) -> None:
    params, spec = load_pretrained(tiny_folder, None)
    for run, bundle in bundles.values():
        found = bundle_params(open_bundle(bundle), params, spec, dtype)
        expected, _ = load_pretrained(run / "export", dtype)
        for name, leaf in expected["layers"].items():
            assert found["layers"][name].dtype == leaf.dtype
            np.testing.assert_array_equal(found["layers"][name], leaf)


def test_a_flipped_byte_in_any_file_is_found(bundles: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    for name, (_, bundle) in bundles.items():
        shutil.copytree(bundle, tmp_path / name)
        for file in sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()):
            data = file.read_bytes()
            for offset in range(0, len(data), len(data) // 40 + 1):
                damaged = bytearray(data)
                damaged[offset] ^= 1 << offset % 8
                file.write_bytes(damaged)
                with pytest.raises(InputError, match=file.name):
                    open_bundle(tmp_path / name)
            file.write_bytes(data[:-1])
            with pytest.raises(InputError, match=file.name):
                open_bundle(tmp_path / name)
            file.unlink()
            with pytest.raises(InputError, match=r"is missing|is not a bundle"):
                open_bundle(tmp_path / name)
            file.write_bytes(data)
        open_bundle(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("masks", lambda arrays: {name: array[1:] for name, array in arrays.items()}),
        ("masks", lambda arrays: arrays | {"other_proj": arrays["q_proj"]}),
        ("adapter", lambda arrays: {name: array for name, array in arrays.items() if name != "lora_b.q_proj"}),
        ("adapter", lambda arrays: arrays | {"lora_a.q_proj": arrays["lora_a.q_proj"][0]}),
        ("moved", lambda arrays: dict(list(arrays.items())[1:])),
        ("moved", lambda arrays: {name: array[:-1] for name, array in arrays.items()}),
        ("masks", None),
    ],
)
def test_sealed_arrays_of_another_model_are_refused(
    file: str, change: Any, bundles: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = shutil.copytree(bundles["efx_run"][1], tmp_path / "bundle")
    path, manifest = folder / f"{file}.safetensors", read_sealed(folder / "bundle.json")
    if change is None:
        path.write_bytes(b"none")
    else:
        save_file(change(load_file(path)), path)
    manifest["files"] |= file_table(folder, [path.name])
    write_sealed(folder / "bundle.json", manifest)
    with pytest.raises(InputError, match=r"not those of the model|cannot be read as safetensors"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("name", "value"), [("base", None), ("scale", "2"), ("export", []), ("patterns", {"q_proj": 1}), ("others", [1])]
)
def test_a_bundle_json_written_by_hand_is_an_input_error(
    name: str, value: Any, bundles: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = shutil.copytree(bundles["paper_run"][1], tmp_path / "bundle")
    write_sealed(folder / "bundle.json", read_sealed(folder / "bundle.json") | {name: value})
    with pytest.raises(InputError, match=f"{name}.* is not what efx_jax writes there"):
        open_bundle(folder)


def test_another_base_is_refused(bundles: dict[str, tuple[Path, Path]], tiny_folder: Path, tmp_path: Path) -> None:
    """One entry of one norm differs; or the weights are the same and config.json is not."""
    bundle = bundles["paper_run"][1]
    params, spec = load_pretrained(tiny_folder, None)
    params["norm"] = params["norm"].at[3].add(1e-3)
    save_pretrained(tmp_path / "other", params, spec, source=tiny_folder)
    with pytest.raises(InputError, match=r"other: is not the base of .*: tensors of SHA-256 \w+\.\.\., expected"):
        apply_bundle(tmp_path / "other", bundle, tmp_path / "out")
    shutil.copytree(tiny_folder, tmp_path / "config")
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    (tmp_path / "config" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(InputError, match="rms_norm_eps 0.001, expected 1e-06"):
        apply_bundle(tmp_path / "config", bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_may_come_in_another_format(
    bundles: dict[str, tuple[Path, Path]], tiny_folder: Path, tmp_path: Path, files_of: Files
) -> None:
    run, bundle = bundles["efx_run"]
    assert main(["import", str(tiny_folder), str(tmp_path / "orbax")]) == 0
    assert main(["pack", str(tiny_folder), str(tmp_path / "packed")]) == 0
    sources = [open_checkpoint(path) for path in (tiny_folder, tmp_path / "orbax", tmp_path / "packed")]
    _, spec = load_pretrained(tiny_folder, None)
    assert len({content_sha256(source, spec) for source in sources}) == 1
    apply_bundle(tmp_path / "packed", bundle, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(run / "export")


def test_files_that_the_base_does_not_give_are_told(
    bundles: dict[str, tuple[Path, Path]], tiny_folder: Path, tmp_path: Path, files_of: Files
) -> None:
    """What has come to the base since is left out; what is gone is an error; what only the export has is carried."""
    run, bundle = bundles["paper_run"]
    shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "base" / "LICENSE").touch()
    apply_bundle(tmp_path / "base", bundle, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(run / "export")
    (tmp_path / "base" / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(InputError, match="gives another tokenizer.json"):
        apply_bundle(tmp_path / "base", bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "export" / "README.md").write_text("An expert.")
    write_bundle(run_outcome(tmp_path / "run"), tmp_path / "own")
    assert (tmp_path / "own" / "others" / "README.md").exists()
    apply_bundle(tiny_folder, tmp_path / "own", tmp_path / "mine")
    assert files_of(tmp_path / "mine") == files_of(tmp_path / "run" / "export")


def test_an_export_that_is_not_the_runs_is_no_bundle(paper_run: Path, official_run: Path, tmp_path: Path) -> None:
    shutil.copytree(paper_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    shutil.copytree(official_run / "export", tmp_path / "run" / "export")
    with pytest.raises(InputError, match="is not what the run's checkpoint and .* give"):
        write_bundle(run_outcome(tmp_path / "run"), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_runs_without_a_bundle_are_refused_with_the_reason(paper_run: Path, tmp_path: Path) -> None:
    shutil.copytree(paper_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        run_outcome(tmp_path / "run")
    settings: dict[str, Any] = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["prune"]["score"] = "atp"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match="has cut out whole units"):
        run_outcome(tmp_path / "run")


@pytest.mark.exhaustive
def test_the_best_model_and_not_the_last_is_bundled(
    launch: Callable[..., Path], tiny_folder: Path, tmp_path: Path, files_of: Files
) -> None:
    """A learning rate that ruins the model after the event; and a group of 4:8 from training to the file."""
    flags = "--eval.best perplexity --eval.every 1 --preset efx --prune.group 4:8 --prune.budget uniform"
    others = "--train.learning_rate 0.3 --prune.recovery gram_pbs --model.dtype bfloat16"
    run = launch(tmp_path / "run", *flags.split(), *others.split())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best"]["step"] == summary["steps"] < 6
    assert json.loads((run / "export" / "efx_sparsity.json").read_text())["pattern"] == "4:8"
    write_bundle(run_outcome(run), tmp_path / "bundle")
    apply_bundle(tiny_folder, tmp_path / "bundle", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(run / "export")


def test_one_command_evaluates_several_experts_as_their_exports(
    bundles: dict[str, tuple[Path, Path]],
    tiny_folder: Path,
    settings_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["--tasks", str(settings_file.parent / "test.jsonl"), "--text", str(settings_file.parent / "rows.jsonl")]
    flags = [*data, "--window", "32", "--max-length", "32", "--compute-dtype", "float32"]
    folders = [str(bundle) for _, bundle in bundles.values()]
    assert evaluate([str(tiny_folder), "--bundle", *folders, *flags, "--output", str(tmp_path / "all")]) == 0
    printed = capsys.readouterr().out
    for name, (run, bundle) in bundles.items():
        assert f"## {bundle}\n" in printed
        assert evaluate([str(run / "export"), *flags, "--output", str(tmp_path / name)]) == 0
        found, expected = (
            json.loads((p / "summary.json").read_text()) for p in (tmp_path / "all" / name, tmp_path / name)
        )
        assert found["tasks"] == expected["tasks"]
        assert found["perplexity"] == expected["perplexity"]
        assert (tmp_path / name / "results.md").read_text() in printed
    assert evaluate([str(bundles["paper_run"][0] / "export"), "--bundle", folders[0], *flags]) == 2
    assert "is not the base of" in capsys.readouterr().err
