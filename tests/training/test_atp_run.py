"""A run that learns which units go: what it writes, that its parts agree, and that it goes on to the same bytes."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import efx_jax
import efx_jax.training.loop as loop_module
import efx_jax.training.search as search_module
from efx_jax.model.spec import LINEARS, linear_shapes
from efx_jax.structural.units import weight_masks

pytestmark = pytest.mark.slow

STEPS, END = 6, 3
FLAGS = ("--prune.score", "atp", "--prune.mask_forward", "frozen", "--prune.schedule", "fractions")
FLAGS += ("--prune.fractions", "0.5", "--atp.learning_rate", "0.03", "--eval.every", "6")
FLAGS += ("--train.checkpoint_every", "1", "--train.keep", "9")
TOKENS = jnp.asarray([[0, 3, 4, 9, 1], [0, 7, 8, 11, 12]], jnp.int32)
logits = jax.jit(efx_jax.forward, static_argnames="spec")


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """Schedule and optimizer are static arguments: runs of equal settings share their compiled steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "learning_rate", functools.lru_cache(loop_module.learning_rate))
        patch.setattr(search_module, "generator_optimizer", functools.lru_cache(search_module.generator_optimizer))
        yield


@pytest.fixture(scope="module")
def run(launch: Callable[..., Path], shared_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("runs") / "atp", *FLAGS)


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_the_generator_learns_until_the_event_and_its_share_is_in_the_metrics(run: Path, metrics_of: Callable) -> None:
    rows = metrics_of(run)
    assert len(rows) == STEPS
    learned = {"generator_loss", "generator_kept"}
    assert [learned <= set(row) for row in rows] == [row["step"] <= END for row in rows]
    # A new generator keeps nearly every unit; the loss has 5 log(p / 0.5) for that, and the cross entropy.
    kept = rows[0]["generator_kept"]
    assert kept > 0.9 and rows[0]["generator_loss"] - 5 * np.log(kept / 0.5) == pytest.approx(rows[0]["loss"], rel=0.3)
    assert len({row["sparsity"] for row in rows[:END]}) == END
    # In this model two hidden units weigh as much as a fourth of a head: the half is met exactly.
    assert [row["sparsity"] for row in rows[END:]] == pytest.approx([0.5] * (STEPS - END), abs=1e-6)


def test_the_export_has_the_promised_parameters_and_no_zeros(run: Path, tiny_folder: Path) -> None:
    params, spec = efx_jax.load_pretrained(run / "export", dtype=None)
    base, base_spec = efx_jax.load_pretrained(tiny_folder, dtype=None)
    cut = summary(run)["cut"]
    before, after = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (base, params))
    assert cut["parameters"] == {"before": before, "kept": after, "written": after}
    linears = sum(base["layers"][name].size for name in LINEARS)
    assert (before - after) / linears == pytest.approx(0.5) == pytest.approx(cut["removed"])
    assert cut["units"] == {"heads": [spec.num_kv_heads] * 2, "hidden": [spec.intermediate_size] * 2}
    assert all((np.asarray(params["layers"][name]) != 0).all() for name in LINEARS)
    # The share that is gone of every matrix, against its size in the base.
    sizes = {name: np.prod(shape) for name, shape in linear_shapes(base_spec).items()}
    for name, shares in summary(run)["sparsity"].items():
        assert shares == pytest.approx([1 - np.prod(linear_shapes(spec)[name]) / sizes[name]] * 2)


def test_the_export_computes_what_the_masked_model_does(run: Path, tiny_folder: Path) -> None:
    saved = ocp.StandardCheckpointer().restore(run / "checkpoints" / str(STEPS) / "state")
    base, spec = efx_jax.load_pretrained(tiny_folder, dtype=None)
    adapters = efx_jax.Adapters(saved["train"]["adapters"]["lora_a"], saved["train"]["adapters"]["lora_b"], 16 / 2)
    masks = weight_masks(saved["units"]["masks"], spec, "sliceable")
    expected = logits(base, TOKENS, spec, adapters, masks)
    exported, small = efx_jax.load_pretrained(run / "export", dtype=None)
    found = logits(exported, TOKENS, small)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.max(jnp.abs(expected))), rtol=0)
    assert float(jnp.max(jnp.abs(expected - logits(base, TOKENS, spec)))) > 1e-2
    # So does what the run itself has measured before it was cut, and after.
    (row,) = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    value = summary(run)["results"]["sparse expert"]["perplexity"]["value"]
    assert row["perplexity"] == pytest.approx(value, rel=1e-5)


def test_transformers_opens_the_smaller_model(run: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    assert model.num_parameters() == summary(run)["cut"]["parameters"]["written"]
    with torch.no_grad():
        expected = model(torch.tensor(np.asarray(TOKENS), dtype=torch.long)).logits.numpy()
    params, spec = efx_jax.load_pretrained(run / "export", dtype=None)
    found = logits(params, TOKENS, spec)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("step", [END - 1, END + 1], ids=["in the search", "after it"])
def test_cut_off_it_goes_on_to_the_same_bytes(
    step: int, run: Path, launch: Callable, tmp_path: Path, files_of: Callable, metrics_of: Callable
) -> None:
    output = tmp_path / "run"
    shutil.copytree(run, output)
    shutil.rmtree(output / "export")
    (output / "summary.json").unlink()
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(output / "checkpoints" / str(later))
    launch(output, *FLAGS)
    assert files_of(output / "export") == files_of(run / "export")
    timeless = [[{**row, "tokens_per_second": 0} for row in metrics_of(folder)] for folder in (output, run)]
    assert timeless[0] == timeless[1]
    assert summary(output)["cut"] == summary(run)["cut"]


def test_a_generator_that_goes_too_far_is_noticed_before_it_decides(
    launch: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*FLAGS, "--prune.fractions", "0.1", "--atp.learning_rate", "1e30")
    run = launch(tmp_path / "run", *flags, code=2)
    said = capsys.readouterr().err
    assert "train.py: step 1: the norm of the generator's weights is not finite; lower atp.learning_rate" in said
    assert list((run / "checkpoints").iterdir()) == []


def test_a_finished_run_prints_what_was_cut_out(
    run: Path, launch: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(run, *FLAGS)
    out = capsys.readouterr().out
    cut = summary(run)["cut"]
    heads = cut["units"]["heads"][0]
    assert f"cut out: 50.00 % of the weights of the linears; a layer keeps {heads} key/value heads, " in out
    assert f"{cut['parameters']['written']:,} in the export" in out
    assert "| matrix | pruned % |" in out
