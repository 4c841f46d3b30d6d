"""Bytes by category, against hand counts, against arrays that are really placed, and against a compiled step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from efx_jax.config import Config, EvalConfig, LoraConfig, MeshConfig, ModelConfig, PruneConfig, TrainConfig
from efx_jax.lora import init_lora
from efx_jax.model.decoder import LinearOptions
from efx_jax.model.spec import LINEARS, init_params
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import tree_shardings
from efx_jax.pruning import output_gradient
from efx_jax.pruning.average import init_prune_state
from efx_jax.training.activations import Layout, block_working_set, saved_activations
from efx_jax.training.lowered import compile_step
from efx_jax.training.memory import event_bytes, host_bytes, memory, resident_bytes, score_bytes, step_bytes
from efx_jax.training.plan import largest_rows
from efx_jax.weights.shapes import find_spec
from tests.tiers import few_of
from tests.tiny import LLAMA

SPEC = dataclasses.replace(LLAMA, tie_word_embeddings=False)
LAYOUT = Layout(dtype="bfloat16", rows=4, length=32, events=3, fused_attention=True)
CONFIG = Config(lora=LoraConfig(rank=2), prune=PruneConfig(ema=0.5))


def on(mesh: tuple[int, int, int], config: Config = CONFIG) -> Config:
    data, fsdp, tensor = mesh
    return dataclasses.replace(config, mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def test_what_stays_on_one_device_is_what_a_hand_counts() -> None:
    adapters = 4 * 2 * 2 * 232
    found = resident_bytes(SPEC, CONFIG, LAYOUT)
    assert found["weights"] == 2 * (2 * 32 * 16 + 2 * 1920 + 5 * 16)
    assert found["masks"] == 2 * 1920 // 8
    assert (found["adapters"], found["optimizer"]) == (adapters, 2 * adapters)
    # Three events: adapters, norms of the four inputs (16, 16, 16, 24) and reach of the 112 rows of each layer.
    assert found["moving average"] == 3 * (adapters + 4 * 2 * (72 + 112))


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 4, 1), (1, 1, 2), (2, 2, 2)])
def test_a_device_holds_the_bytes_that_jax_places_there(mesh: tuple[int, int, int]) -> None:
    config = on(mesh)
    placed = make_mesh(config.mesh)

    def held(tree: object) -> int:
        arrays = jax.tree.leaves(jax.device_put(tree, tree_shardings(placed, tree)))
        return sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards[:1])

    params = init_params(jax.random.key(0), SPEC, "bfloat16")
    adapters = init_lora(jax.random.key(0), params, SPEC, rank=2)
    state = init_prune_state(params, adapters, config.prune, jax.random.key(0), LAYOUT.events)
    found = resident_bytes(SPEC, config, LAYOUT)
    assert found["weights"] == held(params)
    assert found["adapters"] == held(adapters)
    assert found["moving average"] == held(state.snapshots)


def test_without_events_there_are_no_masks_and_no_average() -> None:
    found = resident_bytes(SPEC, CONFIG, dataclasses.replace(LAYOUT, events=0))
    assert found["masks"] == found["moving average"] == 0
    assert memory(SPEC, CONFIG, dataclasses.replace(LAYOUT, events=0)).event == {}


def test_where_events_move_the_base_the_average_stays_with_the_host_and_the_base_exists_twice() -> None:
    prune = PruneConfig(ema=0.5, merge_each_event=True)
    config = dataclasses.replace(CONFIG, prune=prune)
    assert resident_bytes(SPEC, config, LAYOUT)["moving average"] == 0
    assert resident_bytes(SPEC, CONFIG, LAYOUT)["linears of the first base"] == 0
    assert resident_bytes(SPEC, config, LAYOUT)["linears of the first base"] == 2 * 2 * 1920
    # The first event writes what stays beside the first base, a second one a third.
    assert event_bytes(SPEC, config, dataclasses.replace(LAYOUT, events=1))["new base"] == 0
    assert event_bytes(SPEC, config, dataclasses.replace(LAYOUT, events=2))["new base"] == 2 * 2 * 1920


def test_units_in_another_order_are_a_copy_of_their_linears() -> None:
    config = dataclasses.replace(CONFIG, prune=PruneConfig(group="2:4", recovery="admm", permute=True))
    # gate, up and down, v, o.
    assert event_bytes(SPEC, config, LAYOUT)["units in another order"] == 2 * 2 * (3 * 24 * 16 + 8 * 16 + 16 * 16)
    assert event_bytes(SPEC, CONFIG, LAYOUT)["units in another order"] == 0


def test_block_remat_saves_the_residual_stream_of_every_block() -> None:
    assert saved_activations(SPEC, CONFIG, LAYOUT, rows=4) == 3 * 4 * 32 * 16 * 2


@pytest.mark.parametrize(("model", "megabytes"), [("llama-2-7b", 2.98), ("llama-3.1-8b", 3.01), ("qwen3-8b", 3.10)])
def test_the_saved_linears_cost_about_three_megabytes_a_token(model: str, megabytes: float) -> None:
    """L (x + q + k + v + context + o + gate + up) in bfloat16; the stream after the last block is not among them."""
    spec = find_spec(model).spec
    config = Config(train=TrainConfig(remat="linears"))
    saved = saved_activations(spec, config, dataclasses.replace(LAYOUT, length=2048), rows=16)
    per_token = saved / (16 * 2048) - 2 * spec.hidden_size
    assert round(per_token / 1e6, 2) == megabytes


def test_remat_orders_memory() -> None:
    spec = find_spec("llama-2-7b").spec
    layout = dataclasses.replace(LAYOUT, length=2048)
    kinds = ("block", "linears", "none")
    sums = [sum(step_bytes(spec, Config(train=TrainConfig(remat=kind)), layout).values()) for kind in kinds]
    assert sums[0] < sums[1] < sums[2]


def test_exact_masks_need_u_in_the_operands_dtype_and_its_gradient_in_float32() -> None:
    spec = find_spec("llama-2-7b").spec
    widest = 4096 * 11008
    exact = step_bytes(spec, Config(), LAYOUT)["U and dU"]
    frozen = step_bytes(spec, Config(prune=PruneConfig(mask_forward="frozen")), LAYOUT)["U and dU"]
    assert (exact, frozen) == (widest * 6, widest * 2)
    assert step_bytes(spec, on((1, 1, 8), Config()), LAYOUT)["U and dU"] == widest * 6 // 8


def test_an_event_holds_the_grams_of_one_block() -> None:
    spec = find_spec("llama-2-7b").spec
    grams = event_bytes(spec, Config(prune=PruneConfig(recovery="admm")), LAYOUT)["Grams"]
    # Those of a batch and the sums, and what the widest is put together from.
    assert grams == 4 * (2 * (3 * 4096**2 + 11008**2) + 11008**2)
    assert event_bytes(spec, Config(prune=PruneConfig(recovery="pbs")), LAYOUT)["Grams"] == 0
    for prune in (PruneConfig(recovery="obs"), PruneConfig(score="sparsegpt", group="matrix")):
        assert event_bytes(spec, Config(prune=prune), LAYOUT)["Grams"] == grams


def test_atp_holds_a_generator_and_while_it_searches_soft_copies_of_v_and_up() -> None:
    config = dataclasses.replace(CONFIG, prune=PruneConfig(score="atp", mask_forward="frozen"))
    # The encoder's two layers and its norm, and 64 numbers for each of 2 heads and 24 hidden units of 2 layers.
    layer = 4 * 64 * 64 + 4 * 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64
    parameters = 2 * layer + 2 * 64 + 2 * 64 * (2 + 24)
    assert resident_bytes(SPEC, config, LAYOUT)["generator"] == 3 * 4 * parameters
    soft = 2 * 2 * 2 * (8 * 16 + 24 * 16)
    assert step_bytes(SPEC, config, LAYOUT)["soft masks"] == soft + 2 * 4 * parameters
    assert set(event_bytes(SPEC, config, LAYOUT)) == {"new masks"}
    others = memory(SPEC, CONFIG, LAYOUT)
    assert others.resident["generator"] == others.step["soft masks"] == 0


def test_a_sweep_holds_a_blocks_new_weights_and_four_matrices_as_wide_as_the_widest_input() -> None:
    entries = [16 * 16, 8 * 16, 8 * 16, 16 * 16, 24 * 16, 24 * 16, 16 * 24]
    found = event_bytes(SPEC, Config(prune=PruneConfig(recovery="obs")), LAYOUT)["recovery"]
    assert found == sum(entries) * 5 + 24 * 16 * 12 + 4 * 4 * 24**2


def test_the_peak_is_what_stays_and_the_larger_of_step_and_event() -> None:
    found = memory(SPEC, CONFIG, LAYOUT)
    always, step, event = (sum(part.values()) for part in (found.resident, found.step, found.event))
    assert found.peak == always + max(step, event, sum(found.evaluation.values()))


def test_a_model_that_writes_with_its_adapters_holds_its_linears_twice() -> None:
    writing = dataclasses.replace(LAYOUT, events=1, answer_tokens=10)
    cache = 16 * (CONFIG.data.max_length + 10) * 2 * 2 * 2 * 4 * 2
    found = memory(SPEC, CONFIG, writing).evaluation
    assert (found["merged linears"], found["keys and values"]) == (2 * 2 * 1920, cache)
    dense = dataclasses.replace(writing, events=0)
    found = memory(SPEC, CONFIG, dense).evaluation
    assert (found["merged linears"], found["keys and values"]) == (0, cache)
    found = memory(SPEC, CONFIG, LAYOUT).evaluation
    assert found["merged linears"] == found["keys and values"] == 0
    often = dataclasses.replace(CONFIG, eval=EvalConfig(every=1, batch_size=10**6))
    found = memory(SPEC, often, dense)
    assert found.peak == sum(found.resident.values()) + sum(found.evaluation.values())


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_more_devices_never_need_more_of_each(axis: str) -> None:
    spec = find_spec("llama-3.1-70b").spec
    layout = Layout("bfloat16", 16, 2048, 1, True)
    peaks = [memory(spec, Config(mesh=MeshConfig(**{axis: size})), layout).peak for size in (2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)


def test_memory_grows_with_every_sequence() -> None:
    spec = find_spec("qwen3-0.6b").spec
    peaks = [memory(spec, Config(), Layout("bfloat16", rows, 2048, 1, False)).peak for rows in range(1, 20)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 5, 97, 400])
def test_bisection_finds_the_largest_multiple_that_fits(limit: int) -> None:
    asked = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return rows <= limit

    assert largest_rows(fits, unit=4, most=400) == limit // 4 * 4
    assert len(asked) <= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "remat", "dropout"),
    few_of(
        [
            ((1, 1, 1), "block", 0.0),
            ((2, 1, 2), "block", 0.0),
            ((1, 4, 1), "block", 0.0),
            ((1, 1, 1), "none", 0.0),
            ((1, 1, 1), "none", 0.1),
            ((2, 1, 2), "none", 0.1),
        ],
        ((1, 4, 1), "block", 0.0),
    ),
)
def test_the_plan_agrees_with_a_compiled_step(mesh: tuple[int, int, int], remat: str, dropout: float) -> None:
    """In float32, which a CPU does not widen: the arguments to 1 %, the temporaries from 10 % below to 30 % above."""
    spec = dataclasses.replace(find_spec("llama-3.2-1b").spec, num_layers=16, vocab_size=32000)
    config = Config(
        model=ModelConfig(compute_dtype="float32"), lora=LoraConfig(dropout=dropout), train=TrainConfig(remat=remat)
    )
    config = on(mesh, config)
    layout = Layout("float32", 16, 1024, 0, False)
    compiled = compile_step(spec, config, layout)
    assert compiled.arguments == pytest.approx(sum(resident_bytes(spec, config, layout).values()), rel=0.01)
    ratio = sum(step_bytes(spec, config, layout).values()) / compiled.temporaries
    assert 0.9 < ratio < 1.3


def test_the_gradients_of_a_score_are_counted_at_the_batches_that_it_reads() -> None:
    shared: dict[str, Any] = {"score": "foresight_loss", "calibration_rows": 6}
    shared |= {"calibration_length": 16, "calibration_tokens": 64}
    prune = PruneConfig(group="matrix", **shared)
    config = dataclasses.replace(CONFIG, prune=prune)
    found, reads = score_bytes(SPEC, config, LAYOUT), dataclasses.replace(LAYOUT, length=16)
    assert found["saved activations"] == saved_activations(SPEC, config, reads, rows=4) == 3 * 4 * 16 * 16 * 2
    assert found["backward of a block"] == block_working_set(SPEC, config, reads, rows=4)
    by_adapter = dataclasses.replace(CONFIG, prune=PruneConfig(score="lora_gradient", group="matrix"))
    found = score_bytes(SPEC, by_adapter, LAYOUT)
    assert found["saved activations"] == saved_activations(SPEC, CONFIG, LAYOUT, rows=4)
    assert found["importance"] == 4 * 2 * 1920
    assert score_bytes(SPEC, CONFIG, LAYOUT) == {}
    within_rows = dataclasses.replace(CONFIG, prune=PruneConfig(**shared))
    assert score_bytes(SPEC, within_rows, LAYOUT) == {}
    large = dataclasses.replace(prune, calibration_rows=4096, calibration_tokens=65536)
    assert memory(SPEC, dataclasses.replace(config, prune=large), LAYOUT).peak > memory(SPEC, config, LAYOUT).peak


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [False, True])
def test_the_plan_of_a_scores_gradients_agrees_with_the_compiled_ones(drawn: bool) -> None:
    """In float32, from 10 % below to 30 % above, as that of a step."""
    spec = dataclasses.replace(find_spec("llama-3.2-1b").spec, num_layers=4, vocab_size=32000)
    prune = PruneConfig(score="foresight_loss", group="matrix", calibration_tokens=4096, calibration_length=1024)
    config = Config(model=ModelConfig(compute_dtype="float32"), prune=prune)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: init_params(key, spec, "float32"))
    tokens, lengths = jax.ShapeDtypeStruct((4, 1024), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    adapters = jax.eval_shape(
        lambda: init_lora(jax.random.key(0), init_params(jax.random.key(0), spec, "float32"), spec)
    )
    keys = jax.eval_shape(lambda: jax.random.split(key, 4)) if drawn else None
    compiled = output_gradient._batch_energy.lower(
        *(params, adapters, None, tokens, lengths, keys),
        spec=spec,
        names=LINEARS,
        options=LinearOptions(compute_dtype="float32"),
        remat="block",
        attention_path="xla",
    ).compile()
    planned = sum(score_bytes(spec, config, Layout("float32", 16, 1024, 1, False)).values())
    assert 0.9 < planned / compiled.memory_analysis().temp_size_in_bytes < 1.3


def test_an_average_of_scores_takes_the_hosts_memory_once_whatever_the_mesh() -> None:
    moved = dataclasses.replace(CONFIG, prune=PruneConfig(ema=0.5, recovery="admm"))
    assert host_bytes(SPEC, moved, 3) == host_bytes(SPEC, on((2, 2, 2), moved), 3) == 4 * 2 * 1920
    assert host_bytes(SPEC, moved, 1) == host_bytes(SPEC, CONFIG, 3) == 0
