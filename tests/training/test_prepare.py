"""What calibration draws from."""

import dataclasses

import numpy as np
import pytest

from efx_jax.config import Config, PruneConfig
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import InputError
from efx_jax.training import prepare


def calibrated_on(source: str) -> Config:
    return dataclasses.replace(Config(), prune=PruneConfig(calibration=source))


def test_without_c4_the_training_rows_calibrate_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(source: str, config: object) -> list[str]:
        raise InputError(f"{source}: cannot be read")

    monkeypatch.setattr(prepare, "load_text", unreachable)
    rows = [Tokenized(np.arange(4, dtype=np.int32), np.ones(4, bool))]
    with pytest.warns(UserWarning, match="training rows instead of C4: c4: cannot be read"):
        assert prepare._calibration_pool(calibrated_on("c4"), rows, None) is rows
    with pytest.raises(InputError, match=r"other\.jsonl"):
        prepare._calibration_pool(calibrated_on("other.jsonl"), rows, None)
    assert prepare._calibration_pool(calibrated_on("train"), rows, None) is rows
