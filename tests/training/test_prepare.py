"""What calibration draws from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from efx_jax.config import Config, DataConfig, DistillConfig, EvalConfig, ModelConfig, PruneConfig
from efx_jax.data.prompts import Example
from efx_jax.data.tasks import Task
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import FallbackWarning, InputError
from efx_jax.parallel.mesh import make_mesh
from efx_jax.training import prepare
from efx_jax.training import rows as rows_module


def calibrated_on(*sources: str) -> Config:
    return dataclasses.replace(Config(), prune=PruneConfig(calibration=sources))


def test_without_c4_the_training_rows_calibrate_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(source: str, config: object) -> list[str]:
        raise InputError(f"{source}: cannot be read")

    monkeypatch.setattr(rows_module, "load_text", unreachable)

    def pools(*sources: str) -> tuple[list[Tokenized], ...]:
        config = calibrated_on(*sources)
        texts = rows_module.read_texts(rows_module.calibration_texts(config), config)
        return prepare._calibration_pools(config, rows, None, texts)

    rows = [Tokenized(np.arange(4, dtype=np.int32), np.ones(4, bool))]
    for sources in (("c4",), ("train", "c4")):
        with pytest.warns(FallbackWarning, match="training rows instead of C4: c4: cannot be read"):
            # Once: both sources would draw the same rows.
            (pool,) = pools(*sources)
        assert pool is rows
    with pytest.raises(InputError, match=r"other\.jsonl"):
        pools("other.jsonl")
    assert pools("train") == (rows,)


@pytest.mark.parametrize(
    ("distill", "loss_on", "sparsity", "said"),
    [
        (DistillConfig(text="c4"), "response", 0.5, "distill.text c4: is not read, as there is no distill.teacher"),
        (
            DistillConfig(teacher="base"),
            "all",
            0.5,
            "distill.teacher base: teaches nothing, as every token",
        ),
        (DistillConfig(teacher="base", text="c4"), "response", 0.5, None),
        (DistillConfig(teacher="base", text="c4"), "all", 0.0, None),
    ],
)
def test_a_teacher_without_a_say_is_told(
    distill: DistillConfig, loss_on: Any, sparsity: float, said: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    prepare._say_untaught(
        Config(distill=distill, data=DataConfig(loss_on=loss_on), prune=PruneConfig(sparsity=sparsity))
    )
    assert [str(warning.message)[: len(said or "")] for warning in recwarn] == ([said] if said else [])


def test_hosts_that_have_read_different_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, told = [Tokenized(np.arange(4, dtype=np.int32), np.ones(4, bool))], []

    def meet(value: int) -> list[int]:
        told.append(value)
        return told

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("efx_jax.parallel.hosts.meet", meet)
    for origin in ("one host's file row 1", "another's row 1"):
        prepare._refuse_different_hosts(rows, [Task("asked", [Example("cough", " lung", origin)], ("lung", "skin"))])
    assert 0 <= told[0] < 2**31
    with pytest.raises(InputError, match="several hosts: expected the same rows and texts on each of them"):
        prepare._refuse_different_hosts(rows * 2, [])


@pytest.mark.parametrize("sources", [("train",), ("text.txt",), ("train", "text.txt")])
def test_each_seed_calibrates_on_other_rows(sources: tuple[str, ...], tiny_folder: Path, tmp_path: Path) -> None:
    """Of a text too, whose windows are more than the rows that are drawn."""
    words = ["fever", "cough", "rash", "joint", "pain", "heart", "lung", "skin", "blood"]
    lines = [" ".join(row) for row in np.random.default_rng(0).choice(words, (40, 6)).tolist()]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"prompt": "{line}", "response": "yes"}}' for line in lines))
    config = Config(
        model=ModelConfig(path=str(tiny_folder)),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), root=str(tmp_path), max_length=32, holdout=0),
        eval=EvalConfig(window=32),
        prune=PruneConfig(calibration=sources, calibration_rows=3, calibration_length=5),
    )

    def drawn(seed: int) -> list[list[int]]:
        seeded: Any = dataclasses.replace(config, seed=seed)
        batches = prepare.calibration(seeded, prepare.prepare(seeded, make_mesh(config.mesh)))
        assert len(batches) == len(sources)
        rows = [row for batch in batches for row in zip(batch["tokens"], batch["lengths"], strict=True)]
        assert [sum(batch["lengths"] > 0) for batch in batches] == ([3] if len(sources) == 1 else [2, 1])
        return sorted(tokens[:length].tolist() for tokens, length in rows if length)

    first = drawn(0)
    assert len(first) == 3 and {len(row) for row in first} == {5}
    assert first == drawn(0) and first != drawn(1)
