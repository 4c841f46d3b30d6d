"""When the learning rate moves and when events happen."""

import dataclasses

import numpy as np
import pytest

from efx_jax.config import PruneConfig, TrainConfig
from efx_jax.errors import InputError
from efx_jax.training.schedule import Event, learning_rate, prune_events, total_steps

PRUNE, TRAIN = PruneConfig(sparsity=0.5), TrainConfig(epochs=3)


def rates(config: TrainConfig, steps: int) -> np.ndarray:
    schedule = learning_rate(config, steps)
    return np.asarray([float(schedule(number)) for number in range(steps)])


@pytest.mark.parametrize(("rows", "batch_size", "expected"), [(32, 16, 6), (33, 16, 7), (5, 2, 8), (1, 64, 1)])
def test_steps_cover_every_epoch(rows: int, batch_size: int, expected: int) -> None:
    config = dataclasses.replace(TRAIN, batch_size=batch_size)
    assert total_steps(config, rows) == expected
    assert total_steps(dataclasses.replace(config, steps=9), rows) == 9


def test_a_number_of_epochs_that_floats_cannot_hold_makes_no_further_step() -> None:
    # 1.1 * 100 is a little more than 110.
    assert total_steps(TrainConfig(epochs=1.1, batch_size=10), 100) == 11
    assert total_steps(TrainConfig(epochs=1.11, batch_size=10), 100) == 12


@pytest.mark.parametrize(
    ("epochs", "steps", "at"),
    [
        (3, 30, [10, 20, 30]),
        (3, 8, [3, 5, 8]),
        (1, 7, [7]),
        (0.5, 4, [4]),
        (1.5, 30, [20, 30]),
        (2.5, 25, [10, 20, 25]),
        (0, 6, [6]),
    ],
)
def test_epoch_events_fall_at_the_ends_of_the_epochs_and_the_last_at_the_end(
    epochs: float, steps: int, at: list[int]
) -> None:
    # The same whether `steps` comes from the epochs or from train.steps.
    for train in (dataclasses.replace(TRAIN, epochs=epochs), dataclasses.replace(TRAIN, epochs=epochs, steps=steps)):
        events = prune_events(PRUNE, train, steps)
        assert [event.step for event in events] == at
        assert {event.sparsity for event in events} == {0.5}
        assert [event.last for event in events] == [False] * (len(at) - 1) + [True]


def test_fractions_are_shares_of_the_steps() -> None:
    prune = dataclasses.replace(PRUNE, schedule="fractions", fractions=(0.1, 0.5, 1.0))
    assert prune_events(prune, TRAIN, 40) == (Event(4, 0.5, False), Event(20, 0.5, False), Event(40, 0.5, True))


def test_only_the_share_zero_comes_before_the_first_update() -> None:
    prune = dataclasses.replace(PRUNE, schedule="fractions", fractions=(0.0, 0.001))
    assert prune_events(prune, TRAIN, 40) == (Event(0, 0.5, False), Event(1, 0.5, True))
    ramp = dataclasses.replace(PRUNE, schedule="cubic", ramp=(0.0, 0.001), events=2)
    assert [event.step for event in prune_events(ramp, TRAIN, 40)] == [1]


def test_the_cubic_ramp_follows_zhu_and_gupta() -> None:
    prune = dataclasses.replace(PRUNE, schedule="cubic", events=4, ramp=(0.2, 0.6), sparsity=0.8)
    events = prune_events(prune, TRAIN, 100)
    assert [event.step for event in events] == [30, 40, 50, 60]
    # s (1 - (1 - t)^3) at t = 1/4, 1/2, 3/4, 1.
    expected = [0.8 * (1 - 27 / 64), 0.8 * (1 - 1 / 8), 0.8 * (1 - 1 / 64), 0.8]
    np.testing.assert_allclose([event.sparsity for event in events], expected, rtol=1e-12)
    assert events[-1].sparsity == 0.8
    assert [event.last for event in events] == [False, False, False, True]


def test_of_two_events_on_one_step_the_later_one_stands() -> None:
    prune = dataclasses.replace(PRUNE, schedule="cubic", events=10, ramp=(0.0, 1.0), sparsity=0.5)
    events = prune_events(prune, TRAIN, 3)
    assert [event.step for event in events] == [1, 2, 3]
    assert events[-1] == Event(3, 0.5, True)
    # Step 1 stands for t = 0.1 ... 0.4 (0.4 * 3 rounds to 1).
    assert events[0].sparsity == pytest.approx(0.5 * (1 - 0.6**3))


@pytest.mark.parametrize("schedule", ["epochs", "fractions", "cubic"])
def test_without_sparsity_nothing_is_pruned(schedule: str) -> None:
    prune = dataclasses.replace(PRUNE, sparsity=0.0, schedule=schedule)
    assert prune_events(prune, TRAIN, 10) == ()


def test_the_first_update_already_learns_and_the_warm_up_ends_at_the_full_rate() -> None:
    found = rates(TrainConfig(learning_rate=1e-3, warmup=0.4, schedule="constant"), 10)
    np.testing.assert_allclose(found, 1e-3 * np.asarray([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]), rtol=1e-6)
    assert rates(TrainConfig(learning_rate=1e-3, warmup=0.1), 10)[0] == pytest.approx(1e-3)


def test_linear_falls_by_equal_steps_and_would_reach_zero_after_the_last() -> None:
    found = rates(TrainConfig(learning_rate=1e-3, schedule="linear"), 10)
    np.testing.assert_allclose(found, 1e-3 * (1 - np.arange(10) / 10), rtol=1e-6)
    assert float(learning_rate(TrainConfig(learning_rate=1e-3), 10)(10)) == 0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = TrainConfig(learning_rate=1e-3, schedule="cosine", warmup=0.2)
    found = rates(config, 10)
    np.testing.assert_allclose(found[2:], 0.5e-3 * (1 + np.cos(np.pi * np.arange(8) / 8)), rtol=1e-5)
    assert float(learning_rate(config, 10)(10)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_learn_at_every_update(schedule: str, steps: int) -> None:
    for warmup in (0.0, 0.5, 0.9):
        found = rates(TrainConfig(learning_rate=1.0, schedule=schedule, warmup=warmup), steps)
        assert (found > 0).all() and (found <= 1).all()


def test_events_that_fall_on_one_step_are_no_plain_one() -> None:
    prune = dataclasses.replace(PRUNE, schedule="epochs", recovery="pbs", plain_last_event=True)
    assert len(prune_events(prune, TRAIN, 3)) == 3
    with pytest.raises(InputError, match="all events fall on step 1 of 1: prune.recovery pbs would never run"):
        prune_events(prune, TRAIN, 1)
    prune_events(dataclasses.replace(prune, recovery="none"), TRAIN, 1)
