"""A run may start from a PEFT adapter, and what it has trained may leave as one."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import convert_weights
import train
from efx_jax.config import Config, LoraConfig
from efx_jax.config_io import load_config
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import InputError
from efx_jax.training.checkpoint import fingerprint
from efx_jax.training.start import with_adapter
from efx_jax.weights.hf import load_pretrained
from efx_jax.weights.peft import load_adapter
from tests.tiers import few_of
from tests.tiny import linears
from tests.weights.adapter_folders import delta, tensors_for, write_adapter

pytestmark = pytest.mark.slow

Launch = Callable[..., Path]
UNPRUNED = ("--prune.sparsity", "0", "--train.steps", "1", "--train.learning_rate", "1e-12")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Rank 2, as in the settings file, on two of the linears."""
    _, spec = load_pretrained(tiny_folder)
    tensors = tensors_for(spec, lambda layer, name: 2 if name in ("v_proj", "up_proj") else None)
    folder = tmp_path_factory.mktemp("adapters") / "first"
    return write_adapter(folder, tensors, r=2, lora_alpha=1, target_modules=["up_proj", "v_proj"])


@pytest.fixture(scope="module")
def started(launch: Launch, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the adapter whose one update is too small to be seen."""
    return launch(tmp_path_factory.mktemp("runs") / "started", "--lora.adapter", str(adapter), *UNPRUNED)


def test_run_from_an_adapter_trains_that_adapter(started: Path, adapter: Path, tiny_folder: Path) -> None:
    lora = load_config(started / "config.yaml").lora
    assert (lora.rank, lora.alpha, lora.targets) == (2, 1.0, ("v_proj", "up_proj"))
    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    base, found = linears(tiny_folder), linears(started / "export")
    for name, weights in base.items():
        for layer in range(2):
            moved = delta(tensors, layer, name, 0.5) if name in lora.targets else 0.0
            np.testing.assert_allclose(found[name][layer], weights[layer] + moved, rtol=1e-5, atol=1e-6)


def test_table_tells_the_base_from_the_base_with_its_adapter(started: Path) -> None:
    results = json.loads((started / "summary.json").read_text())["results"]
    assert list(results) == ["base", "base with adapter", "dense expert"]
    values = [found["perplexity"]["value"] for found in results.values()]
    assert values[0] != pytest.approx(values[1], rel=1e-3)
    assert values[1] == pytest.approx(values[2], rel=1e-4)


def test_adapter_of_a_run_is_what_it_started_from_where_it_has_learned_nothing(
    started: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_weights.main(["adapter", str(started), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "rank 2, after 1 updates" in out
    _, spec = load_pretrained(started)
    before, after = load_adapter(adapter, spec), load_adapter(tmp_path / "out", spec)
    assert after.scale == before.scale
    assert list(after.lora_a) == list(before.lora_a) == ["v_proj", "up_proj"]
    for name in after.lora_a:
        np.testing.assert_allclose(after.lora_a[name], before.lora_a[name], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(after.lora_b[name], before.lora_b[name], rtol=1e-6, atol=1e-9)


def test_adapter_of_a_run_on_a_run_names_the_export_that_peft_can_open(
    launch: Launch, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(started.parent)
    run = launch(tmp_path / "run", "--model.path", started.name, *UNPRUNED)
    assert convert_weights.main(["adapter", str(run), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(started / "export")


def test_adapter_belongs_to_the_run(
    launch: Launch, started: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(started, "--lora.adapter", str(adapter), *UNPRUNED)
    other = tmp_path / "copy"
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    capsys.readouterr()
    launch(started, "--lora.adapter", str(other), *UNPRUNED, code=2)
    assert "other settings (lora.adapter)" in capsys.readouterr().err
    _, spec = load_pretrained(started)
    adapters = load_adapter(adapter, spec)
    moved = adapters.replace(lora_b={name: 1.5 * half for name, half in adapters.lora_b.items()})
    params = {"embed_tokens": jnp.ones((3, 2))}
    rows = [Tokenized(np.arange(3), np.ones(3, bool))]
    marks = [fingerprint(params, rows, start) for start in (None, adapters, moved)]
    assert len(set(marks)) == 3
    assert marks[1] == fingerprint(params, rows, load_adapter(adapter, spec))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 4}, "lora.rank: expected 2, that of lora.adapter"),
        ({"alpha": 3.0}, "lora.alpha: expected 1, that of lora.adapter"),
        ({"targets": ("q_proj",)}, "lora.targets: expected v_proj up_proj, that of lora.adapter"),
        ({"rslora": True}, "lora.rslora: expected False, that of lora.adapter"),
    ],
)
def test_setting_that_contradicts_the_adapter_is_refused(adapter: Path, lora: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        with_adapter(Config(lora=LoraConfig(adapter=str(adapter), **lora)))


def test_settings_at_their_defaults_or_equal_give_way_to_the_adapter(adapter: Path) -> None:
    expected = with_adapter(Config(lora=LoraConfig(adapter=str(adapter))))
    assert (expected.lora.rank, expected.lora.alpha) == (2, 1.0)
    equal = LoraConfig(adapter=str(adapter), rank=2, alpha=1.0, targets=("up_proj", "v_proj"))
    assert with_adapter(Config(lora=equal)) == with_adapter(expected) == expected


def test_dry_run_plans_with_the_adapter_and_refuses_one_of_another_model(
    settings_file: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(settings_file), "--output", str(tmp_path / "run"), "--dry-run", "--lora.adapter"]
    assert train.main([*flags, str(adapter)]) == 0
    # L (O + I) R of v_proj and up_proj
    assert f"{2 * (8 + 16 + 24 + 16) * 2} trainable parameters (rank 2)" in capsys.readouterr().out
    tensors = tensors_for(load_pretrained(load_config(settings_file).model.path)[1], lambda layer, name: 2)
    other = write_adapter(
        tmp_path / "other", {key.replace("layers.1", "layers.9"): x for key, x in tensors.items()}, r=2
    )
    assert train.main([*flags, str(other)]) == 2
    assert "has no place in a llama model of 2 layers" in capsys.readouterr().err


def test_mask_is_said_to_stay_behind(paper_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_weights.main(["adapter", str(paper_run), str(tmp_path / "out")]) == 0
    assert "the mask is not in the adapter" in capsys.readouterr().out.splitlines()[1]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "words"),
    few_of(
        [("efx_run", "(prune.recovery admm)"), ("official_run", "(prune.merge_each_event)")],
        ("efx_run", "(prune.recovery admm)"),
    ),
)
def test_run_whose_base_has_moved_has_no_adapter(
    name: str, words: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = request.getfixturevalue(name)
    capsys.readouterr()
    assert convert_weights.main(["adapter", str(run), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "have moved its base" in error and words in error and "convert_weights.py bundle" in error
    assert not (tmp_path / "out").exists()
