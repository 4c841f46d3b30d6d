"""Parameters and FLOPs counted from shapes, against hand counts and against the table of published-style figures."""

import dataclasses

import pytest

from efx_jax.config import Config, DistillConfig, LoraConfig, MeshConfig, PruneConfig, TrainConfig
from efx_jax.training.accounting import (
    count_parameters,
    event_flops,
    flops_per_pass,
    flops_per_step,
    flops_per_token,
)
from efx_jax.weights.shapes import find_spec
from tests.tiny import LLAMA

# Per layer: q, o [16,16], k, v [8,16], gate, up [24,16], down [16,24]: 1,920 entries, and O + I sums to 232.
LINEARS = 2 * 1920
LORA = 2 * 2 * 232  # rank 2
ATTENTION = 2 * 8 * 16 * 2  # 2 s (N H) L at s = 8
HEAD = 32 * 16


def settings(mode: str = "exact", remat: str = "none", dropout: float = 0.0) -> Config:
    return Config(
        lora=LoraConfig(rank=2, dropout=dropout),
        prune=PruneConfig(mask_forward=mode),
        train=TrainConfig(remat=remat, batch_size=4),
    )


def test_parameters_of_a_tiny_model_are_those_counted_by_hand() -> None:
    found = count_parameters(LLAMA, settings())
    norms = 2 * 2 * 16 + 16
    assert dataclasses.astuple(found) == (HEAD + LINEARS + norms, LINEARS, LINEARS, LORA)


@pytest.mark.parametrize(
    ("mode", "masked", "dense", "low_rank"),
    [
        ("exact", False, 4, 6),
        ("exact", True, 6, 0),
        ("ste", True, 4, 4),
        ("frozen", True, 4, 6),
        ("dense", True, 4, 6),
    ],
)
def test_each_mask_mode_costs_its_units(mode: str, masked: bool, dense: int, low_rank: int) -> None:
    found = flops_per_token(LLAMA, settings(mode), 8, masked)
    assert (found.linears, found.lora) == (dense * LINEARS, low_rank * LORA)
    assert (found.attention, found.head, found.recompute) == (3 * ATTENTION, 4 * HEAD, 0)


def test_dropout_under_an_exact_mask_costs_ten_units_because_base_and_adapter_see_different_inputs() -> None:
    assert flops_per_token(LLAMA, settings("exact", dropout=0.1), 8, True).linears == 10 * LINEARS
    assert flops_per_token(LLAMA, settings("frozen", dropout=0.1), 8, True).linears == 4 * LINEARS


def test_a_teacher_costs_the_whole_number_of_rows_that_it_reads() -> None:
    def share(rows: int, **mesh: int) -> float:
        config = dataclasses.replace(settings(), distill=DistillConfig("base", row_share=0.5), mesh=MeshConfig(**mesh))
        whole = dataclasses.replace(config, distill=DistillConfig("base"))
        read, every = (flops_per_token(LLAMA, each, 8, True, rows).teacher for each in (config, whole))
        return read / every

    assert [share(rows) for rows in (8, 3, 1)] == pytest.approx([1 / 2, 2 / 3, 1])
    # A row for each of four devices, though two rows would be half; and where no axis divides three rows.
    assert [share(4, data=2, fsdp=2), share(3, data=2, fsdp=2)] == pytest.approx([1, 2 / 3])
    assert flops_per_token(LLAMA, dataclasses.replace(settings(), distill=DistillConfig("base")), 8, False).teacher == 0


def test_a_teacher_that_reads_half_of_a_row_costs_less_than_half() -> None:
    """Queries see fewer keys."""
    prefix, whole = (
        flops_per_token(LLAMA, dataclasses.replace(settings(), distill=each), 8, True).teacher
        for each in (DistillConfig("base", prefix_share=0.5), DistillConfig("base"))
    )
    assert prefix == pytest.approx(whole / 2 - ATTENTION / 4)


def test_a_matrix_without_an_adapter_needs_no_weight_gradient() -> None:
    config = settings()
    config = dataclasses.replace(config, lora=LoraConfig(rank=2, targets=("q_proj",)))
    assert flops_per_token(LLAMA, config, 8, True).linears == 4 * LINEARS + 2 * (2 * 256)


def test_block_remat_computes_everything_again_but_down_proj() -> None:
    down = 2 * 384
    plain = flops_per_token(LLAMA, settings(remat="block"), 8, False)
    exact = flops_per_token(LLAMA, settings(remat="block"), 8, True)
    assert plain.recompute == 2 * (LINEARS - down) + 2 * LORA + ATTENTION
    assert exact.recompute == 2 * (LINEARS - down) + ATTENTION
    assert flops_per_token(LLAMA, settings(remat="linears"), 8, True).recompute == ATTENTION


def test_forming_u_and_its_gradients_is_paid_once_a_pass_and_not_per_token() -> None:
    # U twice, dA and dB from dU: four products of 2 R O I.
    assert flops_per_pass(LLAMA, settings("exact"), True) == 4 * 2 * 2 * LINEARS
    assert flops_per_pass(LLAMA, settings("frozen"), True) == 0
    two = flops_per_step(LLAMA, settings("exact"), 8, 2, True)
    one = flops_per_step(LLAMA, settings("exact"), 8, 1, True)
    assert two - one == 4 * 2 * 2 * LINEARS
    assert one == 4 * 8 * flops_per_token(LLAMA, settings("exact"), 8, True).total + 4 * 2 * 2 * LINEARS


@pytest.mark.parametrize(
    ("model", "printed"),
    [
        ("llama-2-7b", ("28.2", "39.1", "41.0", "51.9")),
        ("llama-3.1-8b", ("31.8", "43.6", "45.6", "57.4")),
        ("qwen3-8b", ("32.2", "44.4", "46.0", "58.1")),
        ("llama-3.1-70b", ("287", "391", "423", "527")),
        ("llama-3.1-405b", ("1642", "2239", "2444", "3040")),
    ],
)
def test_gflops_per_token_at_2048_equal_the_derived_table(model: str, printed: tuple[str, ...]) -> None:
    """Plain, plain + block remat, exact, exact + block remat, at rank 8.

    The table lets block remat compute the head again (2 V D). This program does not: its loss forms the gradient of
    the hidden states in the forward pass, and stands outside the blocks.
    """
    spec = find_spec(model).spec
    head = 2 * spec.vocab_size * spec.hidden_size
    cases = [(False, "none", 0), (False, "block", head), (True, "none", 0), (True, "block", head)]
    totals = [flops_per_token(spec, Config(train=TrainConfig(remat=r)), 2048, m).total + h for m, r, h in cases]
    digits = 0 if "." not in printed[0] else 1
    assert tuple(f"{total / 1e9:.{digits}f}" for total in totals) == printed


# Per layer: sum of O I^2 over the seven matrices, and of I^3 over the four inputs.
WITH_GRAM = 2 * 16 * 16**2 + 2 * 8 * 16**2 + 2 * 24 * 16**2 + 16 * 24**2
CUBES = 3 * 16**3 + 24**3
FORWARD = 2 * LINEARS + ATTENTION


@pytest.mark.parametrize(
    ("change", "passes", "surgeons"),
    [
        ({"score": "wanda"}, FORWARD, None),
        # The only pass over the whole model tells the budget too; block by block it needs one before.
        ({"score": "wanda", "budget": "owl"}, FORWARD, None),
        ({"score": "wanda", "budget": "owl", "sequential": True}, 3 * FORWARD, None),
        ({"budget": "owl", "recovery": "admm", "admm_steps": 20}, 2 * FORWARD, 7 / 3 * CUBES + 21 * 2 * WITH_GRAM),
        ({"score": "lora_gradient", "budget": "owl", "ema": 0.5}, 2 * FORWARD, None),
        ({"score": "wanda", "budget": "owl", "ema": 0.5}, FORWARD, None),
        ({"score": "wanda", "sequential": True}, 2 * FORWARD, None),
        # The gradients' pass leaves what the budget needs, and draws its tokens from its own logits.
        ({"score": "foresight_loss", "budget": "global"}, 4 * FORWARD + 4 * HEAD, None),
        ({"score": "foresight_loss", "group": "matrix", "gradient_labels": "model"}, 4 * FORWARD + 4 * HEAD, None),
        # Within rows it cancels.
        ({"score": "foresight_loss"}, FORWARD, None),
        (
            {
                "score": "foresight_loss",
                "budget": "global",
                "sequential": True,
                "calibration_rows": 40,
                "survey_share": 0.25,
            },
            2.75 * FORWARD + HEAD,
            None,
        ),
        ({"recovery": "admm", "admm_steps": 20}, FORWARD, 7 / 3 * CUBES + 21 * 2 * WITH_GRAM),
        ({"recovery": "gram_pbs"}, FORWARD, 2 * 2 * WITH_GRAM),
        ({"recovery": "gram_pbs", "pbs_rounds": 1}, FORWARD, 2 * 2 * WITH_GRAM),
        ({"recovery": "gram_pbs", "pbs_rounds": 3}, FORWARD, (3 * 2 + 2 * 12) * 2 * WITH_GRAM),
        ({"score": "sparsegpt", "recovery": "obs"}, FORWARD, 7 / 3 * CUBES + 2 * WITH_GRAM),
        ({"score": "sparsegpt", "recovery": "admm"}, FORWARD, 14 / 3 * CUBES + 64 * WITH_GRAM),
        (
            {"recovery": "admm", "admm_steps": 20, "sequential": True, "dense_path": 1.0},
            3 * FORWARD,
            14 / 3 * CUBES + 22 * 2 * WITH_GRAM,
        ),
        ({"swaps": 5}, FORWARD, 2 * WITH_GRAM + 5 * 20 * LINEARS / 2),
    ],
)
def test_an_event_costs_its_passes_its_grams_and_what_is_solved_on_them(
    change: dict[str, object], passes: int, surgeons: float | None
) -> None:
    """100 tokens in rows of 8, two layers, rank 2."""
    found = event_flops(LLAMA, PruneConfig(**change), 2, 100, 8)
    assert found.passes == 100 * passes
    grams = 2 * 100 * 2 * (3 * 16**2 + 24**2) * (2 if "dense_path" in change else 1)
    assert (found.grams, found.surgeons) == ((0, 0) if surgeons is None else (grams, pytest.approx(2 * surgeons)))
