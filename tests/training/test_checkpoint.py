"""What is interrupted goes on to the same bytes; what is half written is ignored; another run's folder is refused."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import efx_jax.training.run as run_module
from efx_jax.config import MeshConfig, TrainConfig
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.parallel.mesh import make_mesh
from efx_jax.pruning.average import PruneState
from efx_jax.structural.generator import Generator
from efx_jax.training import checkpoint, log
from efx_jax.training.atp import generator_optimizer, init_generator_state
from efx_jax.training.claim import claimed
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import RunState, UnitState, init_train_state

SHAPE = (2, 4, 3)
MASKS = {"q_proj": jax.ShapeDtypeStruct(SHAPE, jnp.bool_)}


@pytest.fixture
def state() -> RunState:
    """After 5 updates: arrays that no fresh state holds, a mask, and a key of its own."""
    adapters = Adapters({"q_proj": jnp.full((2, 2, 3), 0.5)}, {"q_proj": jnp.full((2, 4, 2), -0.25)}, 2.0)
    train = dataclasses.replace(init_train_state(adapters, optimizer(TrainConfig(), 9)), step=jnp.int32(5))
    prune = PruneState(jnp.int32(1), {"reach/q_proj": jnp.ones((2, 3, 4))}, {}, jax.random.key(11))
    layers = {"q_proj": jnp.arange(24, dtype=jnp.bfloat16).reshape(SHAPE), "input_layernorm": jnp.ones((2, 3))}
    masks = {"q_proj": jnp.arange(24).reshape(SHAPE) % 2 == 0}
    return RunState(train, {"embed_tokens": jnp.ones((7, 3)), "layers": layers}, masks, prune)


def blank(state: RunState) -> RunState:
    """The run's state at step 0: zeros, no masks, and another key."""
    zeros = jax.tree.map(jnp.zeros_like, dataclasses.replace(state, prune=dataclasses.replace(state.prune, key=None)))
    prune = dataclasses.replace(zeros.prune, key=jax.random.key(0))
    return dataclasses.replace(zeros, masks={}, prune=prune)


def comparable(state: RunState) -> Any:
    prune = dataclasses.replace(state.prune, key=jax.random.key_data(state.prune.key))
    return dataclasses.replace(state, prune=prune)


def at_step(state: RunState, step: int) -> RunState:
    return dataclasses.replace(state, train=dataclasses.replace(state.train, step=jnp.int32(step)))


def save(folder: Path, states: list[RunState], base_moved: bool = False, keep: int = 2) -> None:
    with checkpoint.open_checkpoints(folder, keep) as manager:
        for state in states:
            checkpoint.save(manager, state, base_moved, False, "ba5e", {"step": int(state.train.step), "text": "kept"})


@pytest.mark.parametrize("base_moved", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_restoring_gives_back_every_array(tmp_path: Path, state: RunState, base_moved: bool, masked: bool) -> None:
    state = state if masked else dataclasses.replace(state, masks={})
    save(tmp_path / "c", [state], base_moved)
    fresh = blank(state)
    with checkpoint.open_checkpoints(tmp_path / "c", 2) as manager:
        found = checkpoint.restore(manager, fresh, MASKS, "ba5e")
    assert found is not None
    restored, moved, waiting, notes = found
    # The frozen base is not in the checkpoint: it is the run's own.
    layers = state.params["layers"] if base_moved else fresh.params["layers"]
    expected = dataclasses.replace(state, params={**fresh.params, "layers": layers})
    chex.assert_trees_all_equal(comparable(restored), comparable(expected))
    chex.assert_trees_all_equal_dtypes(comparable(restored), comparable(expected))
    assert (moved, waiting, notes) == (base_moved, False, {"step": 5, "text": "kept"})
    assert restored.train.adapters.scale == 2.0


def test_the_units_of_atp_come_back_and_other_runs_save_none(tmp_path: Path, state: RunState) -> None:
    generator = Generator(embeddings=jnp.ones((2, 64)), weights={"units": {"hidden": jnp.full((2, 5, 64), 0.5)}})
    learned = dataclasses.replace(init_generator_state(generator, generator_optimizer()), step=jnp.int32(5))
    kept = {"hidden": jnp.asarray([[True, False, True, True, False]] * 2)}
    both = dataclasses.replace(state, masks={}, units=UnitState(learned, kept))
    save(tmp_path / "units", [both])
    with checkpoint.open_checkpoints(tmp_path / "units", 2) as manager:
        fresh = dataclasses.replace(blank(both), units=jax.tree.map(jnp.zeros_like, both.units))
        found = checkpoint.restore(manager, fresh, MASKS, "ba5e")
    assert found is not None
    chex.assert_trees_all_equal(found[0].units, both.units)
    chex.assert_trees_all_equal_dtypes(found[0].units, both.units)
    save(tmp_path / "entries", [state])
    assert set(ocp.StandardCheckpointer().restore((tmp_path / "entries" / "5" / "state").absolute())) == {
        "train",
        "masks",
        "prune",
        "prune_key",
    }


def test_the_newest_are_kept(tmp_path: Path, state: RunState) -> None:
    save(tmp_path / "c", [at_step(state, step) for step in (1, 2, 3, 4)], keep=2)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["3", "4"]


def test_a_step_is_saved_once(tmp_path: Path, state: RunState) -> None:
    save(tmp_path / "c", [state, state])
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["5"]


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path, state: RunState) -> None:
    save(tmp_path / "c", [state])
    # What a process that was killed while saving step 6 leaves: Orbax renames only what is complete.
    partial = tmp_path / "c" / "6.orbax-checkpoint-tmp"
    (partial / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (partial / "state.orbax-checkpoint-tmp" / "manifest.ocdbt").write_bytes(b"half")
    with checkpoint.open_checkpoints(tmp_path / "c", 2) as manager:
        found = checkpoint.restore(manager, blank(state), MASKS, "ba5e")
        assert found is not None
        assert int(found[0].train.step) == 5
        checkpoint.save(manager, at_step(state, 6), False, False, "ba5e", {})
    with checkpoint.open_checkpoints(tmp_path / "c", 2) as manager:
        assert manager.latest_step() == 6


@pytest.mark.parametrize("keep", [1, 2])
def test_the_checkpoint_before_an_event_stands_until_the_one_after_it_is_whole(
    tmp_path: Path, state: RunState, keep: int
) -> None:
    save(tmp_path / "c", [state])
    waiting = at_step(state, 6)
    with checkpoint.open_checkpoints(tmp_path / "c", keep) as manager:
        checkpoint.save(manager, waiting, False, True, "ba5e", {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manager, "save", dying)
            with pytest.raises(MemoryError):
                checkpoint.save(manager, waiting, False, False, "ba5e", {})
    with checkpoint.open_checkpoints(tmp_path / "c", keep) as manager:
        found = checkpoint.restore(manager, blank(state), MASKS, "ba5e")
        assert found is not None and (int(found[0].train.step), found[2]) == (6, True)
        checkpoint.save(manager, waiting, False, False, "ba5e", {})
        found = checkpoint.restore(manager, blank(state), MASKS, "ba5e")
    assert found is not None and (int(found[0].train.step), found[2]) == (6, False)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["5", "6"][-keep:]


def test_a_half_removed_checkpoint_is_ignored(tmp_path: Path, state: RunState) -> None:
    """Killed while the checkpoint before an event goes, as the one after it is whole."""

    def die(path: Path) -> None:
        next(path.rglob("_METADATA")).unlink()
        raise MemoryError

    waiting = at_step(state, 6)
    with checkpoint.open_checkpoints(tmp_path / "c", 2) as manager:
        checkpoint.save(manager, waiting, False, True, "ba5e", {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.shutil, "rmtree", die)
            with pytest.raises(MemoryError):
                checkpoint.save(manager, waiting, False, False, "ba5e", {})
    with checkpoint.open_checkpoints(tmp_path / "c", 2) as manager:
        found = checkpoint.restore(manager, blank(state), MASKS, "ba5e")
    assert found is not None and (int(found[0].train.step), found[2]) == (6, False)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["6"]


def dying(*arguments: Any, **options: Any) -> None:
    raise MemoryError


def test_another_base_model_is_refused(tmp_path: Path, state: RunState) -> None:
    save(tmp_path / "c", [state])
    with (
        checkpoint.open_checkpoints(tmp_path / "c", 2) as manager,
        pytest.raises(InputError, match=r"another base model .*\(fingerprint ba5e, found beef\).*--output"),
    ):
        checkpoint.restore(manager, blank(state), MASKS, "beef")


def test_the_fingerprint_sees_one_bit_swapped_entries_and_another_token(state: RunState) -> None:
    weights = state.params["layers"]["q_proj"]
    rows = [
        Tokenized(np.arange(5, dtype=np.int32), np.arange(5) > 2),
        Tokenized(np.zeros(3, np.int32), np.ones(3, bool)),
    ]
    found = {
        checkpoint.fingerprint({"layers": {"q_proj": leaf}}, rows)
        for leaf in (weights, weights.at[1, 2, 0].multiply(-1), weights.at[0, 0].set(weights[0, 0, ::-1]), -weights)
    }
    assert len(found) == 4
    same = checkpoint.fingerprint(state.params, rows)
    assert same == checkpoint.fingerprint(jax.tree.map(jnp.copy, state.params), list(rows))
    other_loss = Tokenized(rows[0].tokens, ~rows[0].loss)
    others = [rows[::-1], rows[:1], [other_loss, rows[1]]]
    assert len({same, *(checkpoint.fingerprint(state.params, changed) for changed in others)}) == 4


def test_a_fingerprint_on_a_mesh_is_the_same_and_gathers_nothing() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    weights = jax.random.normal(jax.random.key(0), (2, 16, 8), jnp.bfloat16)
    placed = jax.device_put(weights, NamedSharding(mesh, PartitionSpec(None, ("tensor", "fsdp"), None)))
    found = [checkpoint.fingerprint({"layers": {"gate_proj": leaf}}, []) for leaf in (weights, placed)]
    assert found[0] == found[1]
    program = checkpoint.weights_checksum.lower({"layers": {"gate_proj": placed}}).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path: Path, state: RunState) -> None:
    with checkpoint.open_checkpoints(tmp_path / "c", 2) as manager:
        assert checkpoint.restore(manager, blank(state), MASKS, "ba5e") is None


def test_a_saved_state_may_be_consumed_at_once(tmp_path: Path, state: RunState) -> None:
    """The next step takes over the buffers of the state that is still being written."""
    next_state = jax.jit(lambda train: jax.tree.map(lambda leaf: leaf + 1, train), donate_argnums=0)
    with checkpoint.open_checkpoints(tmp_path / "c", 2) as manager:
        train = jax.tree.map(jnp.copy, state.train)
        checkpoint.save(manager, dataclasses.replace(state, train=train), False, False, "ba5e", {})
        for _ in range(3):
            train = next_state(train)
    with checkpoint.open_checkpoints(tmp_path / "c", 2) as manager:
        found = checkpoint.restore(manager, blank(state), MASKS, "ba5e")
    assert found is not None
    chex.assert_trees_all_equal(found[0].train, state.train)


def after_row(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Does something as soon as the line of a step is in metrics.jsonl."""
    append = log.append_row

    def wrapped(path: Path, row: log.Row) -> None:
        append(path, row)
        if row["step"] == step:
            act()

    monkeypatch.setattr(log, "append_row", wrapped)


def same_run(found: Path, expected: Path, metrics_of, files_of) -> None:
    """Same lines but for the speed, and an export of the same bytes."""
    rows = [
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics_of(r)] for r in (found, expected)
    ]
    assert rows[0] == rows[1]
    assert files_of(found / "export") == files_of(expected / "export")


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(
    launch, efx_run: Path, tmp_path: Path, monkeypatch, capsys, metrics_of, files_of
) -> None:
    """A base that ADMM has moved comes back from the checkpoint."""
    handler = signal.getsignal(signal.SIGINT)  # ignored where a shell has put the tests into the background
    run, flags = tmp_path / "run", ("--preset", "efx")
    with monkeypatch.context() as patch:
        after_row(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        launch(run, *flags, code=130)
    said = capsys.readouterr().err
    assert "interrupted after 3 of 6 steps; saved" in said
    assert f"--output {run}" in said
    assert not (run / "summary.json").exists() and not (run / "export").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    launch(run, *flags)
    same_run(run, efx_run, metrics_of, files_of)


def test_a_run_that_did_not_fit_goes_on_in_smaller_parts(
    launch, paper_run: Path, tmp_path: Path, monkeypatch, metrics_of, capsys
) -> None:
    run, flags = tmp_path / "run", ("--preset", "paper")

    def run_out() -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        after_row(patch, 4, run_out)
        launch(run, *flags, code=2)
    assert "out of memory on the device (RESOURCE_EXHAUSTED: Out of memory)" in capsys.readouterr().err
    launch(run, *flags, "--train.learning_rate", "1e-3", code=2)
    assert "other settings (train.learning_rate)" in capsys.readouterr().err
    launch(run, *flags, "--train.micro_batch", "1", "--train.remat", "block", "--prune.calibration_tokens", "32")
    found, expected = ([row["loss"] for row in metrics_of(each)] for each in (run, paper_run))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    launch, paper_run: Path, tmp_path: Path, monkeypatch, metrics_of, files_of
) -> None:
    """Frozen base, moving average rebuilt from snapshots: dies in step 4, before the event that follows it."""
    run, flags = tmp_path / "run", ("--preset", "paper")

    def die() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        after_row(patch, 4, die)
        with pytest.raises(MemoryError):
            launch(run, *flags)
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3, 4]
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    launch(run, *flags)
    same_run(run, paper_run, metrics_of, files_of)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "6"]


def test_a_finished_run_prints_its_table_again_and_does_nothing(
    launch, paper_run: Path, monkeypatch, capsys, files_of
) -> None:
    before = files_of(paper_run)

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished run loads nothing")

    monkeypatch.setattr(run_module, "prepare", refuse)
    launch(paper_run, "--preset", "paper")
    out = capsys.readouterr().out
    assert "| sparse expert |" in out and "| q_proj | 50.00 | 50.00 | 50.00 |" in out
    assert str(paper_run / "export") in out
    assert files_of(paper_run) == before


def test_a_run_at_work_keeps_others_out(launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claimed(tmp_path / "run"):
        launch(tmp_path / "run", "--preset", "paper", code=2)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{tmp_path / 'run'}: another process is at work on this run" in said
        assert list((tmp_path / "run").iterdir()) == []


def test_what_a_killed_run_was_about_to_rename_goes(tmp_path: Path) -> None:
    (tmp_path / ".export.00c0ffee.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".config.yaml.x.partial").touch()
    (tmp_path / "metrics.jsonl").touch()
    with claimed(tmp_path), pytest.raises(InputError, match="another process"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_settings_on_the_same_output_are_refused_by_name(launch, paper_run: Path, capsys, files_of) -> None:
    before = files_of(paper_run)
    launch(paper_run, "--preset", "paper", "--train.learning_rate", "0.5", "--seed", "3", code=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "(train.learning_rate, seed)" in said and str(paper_run) in said
    assert files_of(paper_run) == before
