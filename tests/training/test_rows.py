"""Text without labels among the training rows: how much of it, for whom, and a run that learns from it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efx_jax.config import Config, DataConfig, DistillConfig, PruneConfig
from efx_jax.config_rules import validate
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import FallbackWarning, InputError
from efx_jax.training import loop, rows
from efx_jax.training.start import unpruned
from efx_jax.training.step import Batch, StepOptions, without_silent_tail
from efx_jax.weights.hf import load_tokenizer

OWN = [Tokenized(np.arange(2, 2 + size, dtype=np.int32), np.arange(size) >= 3) for size in (5, 9, 4, 6)]
WORDS = "fever cough rash joint pain heart lung skin blood yes"


def taught(text: Any, share: float = 0.5) -> Config:
    return Config(
        data=DataConfig(max_length=8, root=str(Path(text).parent)),
        distill=DistillConfig("base", text=str(text), text_share=share),
    )


def trained_on(config: Config, tokenizer: Any = None) -> list[Tokenized]:
    texts = rows.read_texts(rows.taught_texts(config), config)
    return rows.training_rows(config, OWN, tokenizer, texts)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_so_many_tokens_come_from_the_text_without_a_label(share: float, tiny_folder: Path, tmp_path: Path) -> None:
    """Ten words are 24 tokens at a half and 216 at nine tenths: the text comes again."""
    (tmp_path / "text.txt").write_text(WORDS)
    found = trained_on(taught(tmp_path / "text.txt", share), load_tokenizer(str(tiny_folder)))
    assert all(ours is theirs for ours, theirs in zip(found, OWN, strict=False))
    added = found[len(OWN) :]
    assert not any(row.loss.any() for row in added) and max(len(row.tokens) for row in added) <= 8
    asked, most = share / (1 - share) * 24, max(len(row.tokens) for row in added)
    assert asked <= sum(len(row.tokens) for row in added) < asked + most


def test_only_a_teacher_has_a_use_for_it(tmp_path: Path) -> None:
    config = taught(tmp_path / "missing.txt")
    for change in ({"distill": DistillConfig("base")}, {"distill": dataclasses.replace(config.distill, teacher="")}):
        assert trained_on(dataclasses.replace(config, **change)) is OWN
    assert trained_on(unpruned(config)) is OWN
    assert not rows.taught_texts(dataclasses.replace(config, data=DataConfig(loss_on="all")))
    with pytest.raises(InputError, match=r"missing\.txt"):
        trained_on(config)


def test_without_c4_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(source: str, config: object) -> list[str]:
        raise InputError(f"{source}: cannot be read")

    monkeypatch.setattr(rows, "load_text", unreachable)
    with pytest.warns(FallbackWarning, match="training rows instead of C4: c4: cannot be read"):
        assert trained_on(taught("c4")) is OWN


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distill": DistillConfig("base", text="c4", text_share=1.0)}, "distill.text_share must be in"),
        ({"prune": PruneConfig(score="dpruner")}, "distill.text must be empty with prune.score dpruner"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        validate(dataclasses.replace(Config(distill=DistillConfig("base", text="c4")), **change))


@pytest.mark.slow
def test_a_run_reads_it_in_batches_of_its_own(launch: Any, tmp_path: Path) -> None:
    """Nine tokens in ten are text: of twelve batches of four some have no label, and no loss to tell."""
    (tmp_path / "text.txt").write_text("\n\n".join([WORDS] * 30))
    flags = "--distill.teacher base --distill.text_share 0.9 --prune.schedule fractions --prune.fractions 0.25"
    run = launch(tmp_path / "run", *flags.split(), "--distill.text", str(tmp_path / "text.txt"), "--train.steps", "12")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["divergence" in row for row in metrics] == [False] * 3 + [True] * 9
    unlabelled = [row for row in metrics if "loss" not in row]
    assert 0 < len(unlabelled) < 12 and all("entropy" not in row and row["tokens_per_second"] > 0 for row in unlabelled)
    assert "where rows have no labels and on text of text.txt" in (run / "export" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_does_not_read_text_that_its_teacher_does_not(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of text end where the teacher stops; the run learns what it would from all of them."""
    (tmp_path / "text.txt").write_text("\n\n".join([WORDS] * 30))
    flags = "--distill.teacher base --distill.text_share 0.9 --distill.prefix_share 0.1 --train.steps 6"
    flags += f" --prune.schedule fractions --prune.fractions 0.25 --distill.text {tmp_path / 'text.txt'}"
    lengths: list[tuple[int, int]] = []

    def watched(batch: Batch, options: StepOptions) -> tuple[Batch, StepOptions]:
        cut, taken = without_silent_tail(batch, options)
        lengths.append((batch["tokens"].shape[1], cut["tokens"].shape[1]))
        return cut, taken

    monkeypatch.setattr(loop, "without_silent_tail", watched)
    short = launch(tmp_path / "short", *flags.split())
    monkeypatch.setattr(loop, "without_silent_tail", lambda batch, options: (batch, options))
    whole = launch(tmp_path / "whole", *flags.split())
    assert set(lengths) == {(32, 32), (32, 4)} and len(lengths) == 6
    found, expected = ((run / "metrics.jsonl").read_text().splitlines() for run in (short, whole))
    for row, other in zip(map(json.loads, found), map(json.loads, expected), strict=True):
        assert row["tokens"] == other["tokens"] and set(row) == set(other)
        np.testing.assert_allclose(row.get("divergence", 0), other.get("divergence", 0), rtol=1e-4)
        np.testing.assert_allclose(row["grad_norm"], other["grad_norm"], rtol=1e-4)
