"""Which teachers are refused, and runs that learn from one."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from efx_jax.config import Config, DataConfig, DistillConfig, PruneConfig
from efx_jax.config_rules import validate
from efx_jax.errors import InputError
from efx_jax.model.spec import init_params
from efx_jax.training.start import unpruned
from efx_jax.training.step import has_teacher
from efx_jax.weights.hf import save_pretrained
from tests.tiny import LLAMA, save_tokenizer

KEY = jax.random.key(3)
Tree = dict[str, Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distill": DistillConfig("base", weight=0.0)}, "distill.weight must be above 0"),
        ({"distill": DistillConfig("base", share=0.0)}, "distill.share must be in"),
        ({"distill": DistillConfig("base", row_share=0.0)}, "distill.row_share must be in"),
        ({"distill": DistillConfig("base", prefix_share=1.5)}, "distill.prefix_share must be in"),
        (
            {"prune": PruneConfig(score="atp", mask_forward="frozen", schedule="fractions")},
            "distill.teacher must be empty with prune.score atp",
        ),
    ],
)
def test_what_leaves_the_teacher_nothing_to_teach_is_refused(change: Tree, message: str) -> None:
    config = dataclasses.replace(Config(distill=DistillConfig("base")), **change)
    with pytest.raises(InputError, match=message) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_a_dense_run_and_one_of_nothing_but_labels_have_no_teacher() -> None:
    """So runs with and without one share what they have learned before their first event."""
    taught = Config(distill=DistillConfig("base"))
    assert unpruned(taught) == unpruned(Config())
    assert has_teacher(taught) and not has_teacher(unpruned(taught))
    assert not has_teacher(dataclasses.replace(taught, data=DataConfig(loss_on="all")))


@pytest.mark.slow
@pytest.mark.parametrize("recovery", ["admm", "none"])
def test_a_run_learns_from_its_base_from_the_first_event_on(launch: Any, tmp_path: Path, recovery: str) -> None:
    """Moved by the event or not, the base that it started from is the teacher."""
    early = ("--prune.schedule", "fractions", "--prune.fractions", "0.5", "--train.steps", "4")
    run = launch(tmp_path / "run", "--distill.teacher", "base", "--prune.recovery", recovery, *early)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["divergence" in row for row in rows] == [False, False, True, True]
    assert all(row["divergence"] > 0 for row in rows[2:])


def test_a_teacher_of_another_vocabulary_is_refused(
    launch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = dataclasses.replace(LLAMA, vocab_size=31)
    save_pretrained(tmp_path / "other", init_params(KEY, larger), larger)
    launch(tmp_path / "run", "--distill.teacher", str(tmp_path / "other"), code=2)
    told = capsys.readouterr().err.strip()
    assert "has a vocabulary of 31 tokens, expected the model's 23" in told
    assert "\n" not in told and not (tmp_path / "run").exists()


def test_a_teacher_that_reads_shorter_rows_than_training_has_is_refused(
    launch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = dataclasses.replace(LLAMA, vocab_size=23, max_position_embeddings=16)
    save_pretrained(tmp_path / "short", init_params(KEY, short), short)
    launch(tmp_path / "run", "--distill.teacher", str(tmp_path / "short"), code=2)
    told = capsys.readouterr().err.strip()
    assert "has a context of 16 tokens, expected at least data.max_length 32" in told


def test_a_teacher_that_the_mesh_does_not_divide_is_refused_before_the_base_is_read(
    launch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = dataclasses.replace(LLAMA, vocab_size=24, intermediate_size=50)
    save_pretrained(tmp_path / "odd", init_params(KEY, odd), odd)
    even = dataclasses.replace(LLAMA, vocab_size=24, intermediate_size=48)
    save_pretrained(tmp_path / "even", init_params(KEY, even), even)
    save_tokenizer(tmp_path / "even")
    monkeypatch.setattr("efx_jax.training.prepare.load_pretrained", None)
    flags = ("--model.path", str(tmp_path / "even"), "--mesh.fsdp", "4", "--train.batch_size", "4")
    launch(tmp_path / "run", "--distill.teacher", str(tmp_path / "odd"), *flags, code=2)
    told = capsys.readouterr().err.strip()
    assert f"{tmp_path / 'odd'}: the output width of gate_proj: 50 does not divide into 4" in told
    assert not (tmp_path / "run").exists()


def test_a_teacher_whose_ids_mean_other_tokens_is_refused(
    launch: Any, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    text = (other / "tokenizer.json").read_text()
    tokens = json.loads(text)["model"]["vocab"]
    first, second = sorted(tokens, key=tokens.get)[-2:]
    swapped = text.replace(f'"{first}": {tokens[first]}', f'"{first}": {tokens[second]}')
    swapped = swapped.replace(f'"{second}": {tokens[second]}', f'"{second}": {tokens[first]}')
    assert swapped != text
    (other / "tokenizer.json").write_text(swapped)
    launch(tmp_path / "run", "--distill.teacher", str(other), code=2)
    told = capsys.readouterr().err.strip()
    assert f"token {tokens[first]} is {second!r}, expected {first!r} as in the model's tokenizer" in told
