"""Settings of the scores, repairs and budgets that are refused before a run, with the reason."""

from typing import Any

import pytest

from efx_jax.config import Config, PruneConfig
from efx_jax.config_event import without_recovery
from efx_jax.config_prune import validate_prune
from efx_jax.config_rules import validate
from efx_jax.errors import InputError


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"ria_power": -0.5}, "prune.ria_power must be at least 0, found -0.5"),
        ({"owl_lambda": -0.1}, "prune.owl_lambda must be at least 0"),
        ({"owl_multiple": 0.0}, "prune.owl_multiple must be above 0"),
        ({"score": "sparsegpt", "ema": 0.5}, "prune.ema must be 1 with prune.score sparsegpt"),
        ({"recovery": "admm", "dense_path": 0.5}, "prune.dense_path must be 0 without prune.sequential and a recovery"),
        ({"sequential": True, "dense_path": 1.5}, "prune.dense_path must be in"),
        ({"swaps": -1}, "prune.swaps must be at least 0, found -1"),
        ({"score": "sparsegpt", "recovery": "obs", "swaps": 9}, "prune.swaps must be 0 with prune.score sparsegpt and"),
        ({"recovery": "admm", "pbs_rounds": 2}, "prune.pbs_rounds must be 0 with prune.recovery admm: only gram_pbs"),
        (
            {"recovery": "admm", "admm_refine": 9, "swaps": 9},
            "prune.swaps must be 0 with prune.admm_refine, whose",
        ),
        (
            {"recovery": "gram_pbs", "pbs_rounds": 2, "mask_forward": "frozen"},
            "prune.mask_forward must be another than frozen with prune.pbs_rounds",
        ),
        (
            {"score": "sparsegpt", "group": "bounded"},
            "prune.group must be row, matrix or N:M with prune.score sparsegpt",
        ),
        ({"budget": "owl", "group": "2:4"}, "prune.budget must be uniform with prune.group 2:4"),
        ({"permute": True, "recovery": "admm"}, "prune.permute must be false without prune.group N:M"),
        ({"permute": True, "group": "2:4"}, "and prune.recovery admm or obs, which write weights, found True"),
    ],
)
def test_what_excludes_itself_is_refused_with_one_line(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        validate(Config(prune=PruneConfig(**prune)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prune",
    [
        {"score": "sparsegpt", "recovery": "obs", "group": "matrix"},
        {"score": "sparsegpt", "recovery": "gram_pbs", "group": "4:8"},
        {"score": "sparsegpt", "recovery": "obs", "group": "matrix", "budget": "owl", "schedule": "cubic"},
        {"score": "foresight_gated", "recovery": "obs", "group": "bounded", "ema": 0.5},
        {"score": "ria", "budget": "owl", "group": "row", "ema": 0.5},
    ],
)
def test_scores_repairs_and_budgets_go_together(prune: dict[str, Any]) -> None:
    validate(Config(prune=PruneConfig(**prune)))


@pytest.mark.parametrize("prune", [{"recovery": "gram_pbs", "pbs_rounds": 2}, {"recovery": "admm", "dense_path": 1.0}])
def test_a_plain_last_event_is_one_that_may_be(prune: dict[str, Any]) -> None:
    settings = PruneConfig(**prune, sequential=True, ema=0.5, plain_last_event=True)
    validate(Config(prune=settings))
    validate_prune(without_recovery(settings))
