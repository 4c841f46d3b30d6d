"""The README's Python runs as it stands, on a tiny checkpoint in place of the named one."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np

import efx_jax
from efx_jax.config import Config, PruneConfig
from efx_jax.config_io import resolve
from efx_jax.model.spec import init_params
from efx_jax.training.start import different_settings
from efx_jax.weights.hf import save_pretrained
from tests.tiny import LLAMA

README = Path(__file__).parents[1] / "README.md"
SPEC = dataclasses.replace(LLAMA, vocab_size=64)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_training_loop_of_the_readme_prunes_and_exports(tmp_path: Path) -> None:
    model, expert = tmp_path / "model", tmp_path / "expert"
    save_pretrained(model, init_params(jax.random.key(0), SPEC), SPEC)
    code = next(block for block in blocks() if "TrainState" in block)
    code = code.replace('"HuggingFaceTB/SmolLM2-135M"', repr(str(model))).replace('"expert"', repr(str(expert)))
    tokens = np.random.default_rng(0).integers(0, 64, (6, 2, 12))
    names: dict[str, Any] = {"my_batches": list(tokens), "my_calibration": list(tokens[:2])}
    exec(compile(code, "README.md", "exec"), names)
    params, _ = efx_jax.load_pretrained(expert)
    zeros = {name: float((leaf == 0).mean()) for name, leaf in params["layers"].items() if name.endswith("_proj")}
    assert len(zeros) == 7
    np.testing.assert_allclose(list(zeros.values()), 0.5, atol=1e-6)
    assert names["masks"] is not None
    assert np.isfinite(float(names["loss"]))


def test_the_flax_layer_of_the_readme_is_pruned_in_place() -> None:
    code = next(block for block in blocks() if "nnx.Linear" in block)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    kernel = np.asarray(names["layer"].kernel[...])
    np.testing.assert_array_equal((kernel == 0).sum(axis=0), kernel.shape[0] // 2)
    assert names["error_after"] < names["error_masked"]


def test_no_two_commands_of_the_readme_are_different_runs_in_one_folder() -> None:
    commands = re.findall(r"python train\.py[^`\n#]*", README.read_text())
    commands = [command for command in commands if not re.search(r"--help|FILE|/path/to", command)]
    runs: dict[Path, Config] = {}
    for command in commands:
        found = resolve(shlex.split(command)[2:])
        first = runs.setdefault(found.output, found.config)
        assert different_settings(first, found.config) == [], command
    assert len(runs) >= 4


def test_the_event_of_the_best_preset_in_the_readme_prunes() -> None:
    code = next(block for block in blocks() if "output_gradient_energy" in block)
    params = init_params(jax.random.key(0), SPEC)
    names: dict[str, Any] = {
        "efx_jax": efx_jax,
        "jax": jax,
        "PruneConfig": PruneConfig,
        "params": params,
        "spec": SPEC,
        "adapters": efx_jax.init_lora(jax.random.key(1), params, SPEC, rank=2, alpha=4),
        "masks": None,
        "prune_state": None,
        "my_calibration": list(np.random.default_rng(0).integers(0, 64, (2, 2, 12))),
    }
    exec(compile(code, "README.md", "exec"), names)
    preset = resolve(["--preset", "efx"]).config.prune
    chosen = {field.name: getattr(names["config"], field.name) for field in dataclasses.fields(PruneConfig)}
    elsewhere = {"schedule", "fractions", "calibration", "gradient_labels", "survey_share"}  # choices of a whole run
    assert {name: value for name, value in chosen.items() if name not in elsewhere} == {
        name: getattr(preset, name) for name in chosen if name not in elsewhere
    }
    kept = sum(float(mask.sum()) for mask in names["masks"].values())
    total = sum(mask.size for mask in names["masks"].values())
    np.testing.assert_allclose(kept / total, 0.5, atol=2e-3)
