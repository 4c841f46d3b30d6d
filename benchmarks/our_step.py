"""One training step of this program, a case of `train_step.py`: a rate, random weights, and the modes in turn."""

import argparse
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from cases import answer, reason
from random_model import (
    ALPHA,
    RANK,
    matmul_rate,
    peak_memory,
    random_adapters,
    random_masks,
    random_params,
    shape_config,
)
from rows import interleaved, median, spread

from efx_jax.config import (
    Config,
    DistillConfig,
    LoraConfig,
    MaskForward,
    ModelConfig,
    PruneConfig,
    Remat,
    TrainConfig,
)
from efx_jax.config_io import load_config
from efx_jax.model.attention import choose_attention
from efx_jax.model.spec import ModelSpec, spec_from_config
from efx_jax.training.devices import find_device
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import init_train_state
from efx_jax.training.step import StepOptions, Teacher, has_teacher, step_options, train_step, without_silent_tail

# Only on request: taught needs tokens without a label, and text has no others.
TAUGHT, TEXT = "taught", "text"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one case asks of its process, in which the modes take turns."""

    model: str
    modes: list[str]
    remat: Remat
    batch: int
    length: int
    micro_batch: int
    repeats: int
    labels: float


def measure(case: Mapping[str, Any]) -> dict[str, Any]:
    """One process: the rate of a matmul, then weights, then the modes in turn."""
    work = Work(**case)
    spec = spec_from_config(shape_config(work.model))
    device = find_device("", 1)
    rate = matmul_rate(work.micro_batch * work.length, spec, work.repeats)
    attention_path = choose_attention(spec, "bfloat16")
    params = jax.block_until_ready(random_params(jax.random.key(0), spec, "bfloat16"))
    masks = None if work.modes == ["plain"] else random_masks(jax.random.key(1), spec)
    batch = random_batch(work, spec)
    modes: dict[str, Any] = {}
    rivals = {}
    for mode in work.modes:
        config = mode_config(mode, work.batch, work.remat)
        options = step_options(config, work.micro_batch, attention_path)
        teacher = Teacher(params, spec) if has_teacher(config) else None
        in_force = None if mode == "plain" else masks
        read = batch
        if mode == TEXT:
            read, options = without_silent_tail({**batch, "weights": 0 * batch["weights"]}, options)
        try:
            rivals[mode], modes[mode] = prepare(spec, params, in_force, read, options, teacher)
        except Exception as error:  # with several modes in one process, the others go on
            if work.modes == [mode]:
                raise
            modes[mode] = {"error": reason(error)}
    for mode, taken in interleaved(rivals, work.repeats).items():
        modes[mode] |= {"seconds": median(taken), "spread": spread(taken)}
    peak = peak_memory() if len(work.modes) == 1 else None
    if peak is not None:
        modes[work.modes[0]] |= {"peak_bytes": peak, "peak_by": "device"}
    return {
        "modes": modes,
        "matmul_rate": rate,
        "peak_rate": device.peak,
        "device": device.name,
        "platform": jax.default_backend(),
        "attention": attention_path,
    }


def prepare(
    spec: ModelSpec, params: Any, masks: Any, batch: Any, options: StepOptions, teacher: Teacher | None
) -> tuple[Any, dict[str, Any]]:
    """A function that reruns a compiled step, which has run once, and what compilation reported."""
    tx = optimizer(TrainConfig(), 1000)
    state = init_train_state(random_adapters(jax.random.key(2), params, spec), tx)
    key = jax.random.key(3)
    began = time.perf_counter()
    compiled = train_step.lower(state, params, masks, batch, key, spec, tx, options, teacher).compile()
    compile_seconds = time.perf_counter() - began
    plan: Any = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    if teacher is not None:  # the base, passed twice but in memory once
        held -= sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, params, masks, batch, key, teacher)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    first_loss = run()
    if not math.isfinite(first_loss):
        raise FloatingPointError(f"the loss is {first_loss}")
    found = {"compile_seconds": compile_seconds, "first_loss": round(first_loss, 4)}
    return run, found | {"peak_bytes": held, "peak_by": "compiler"}


def random_batch(work: Work, spec: ModelSpec) -> dict[str, jax.Array]:
    """Full rows of random tokens; the last share `labels` of each carries loss, except its very last token."""
    first = min(work.length - 2, round((1 - work.labels) * work.length))
    tokens = jax.random.randint(jax.random.key(4), (work.batch, work.length), 0, spec.vocab_size, jnp.int32)
    return {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "weights": jnp.zeros(tokens.shape, jnp.float32).at[:, first:-1].set(1.0),
        "lengths": jnp.full(work.batch, work.length, jnp.int32),
    }


def mode_config(mode: str, batch: int, remat: Remat) -> Config:
    """The settings of a mode; `taught` and `text` as in the preset `efx`."""
    modes: dict[str, MaskForward] = {
        "plain": "dense",
        "exact": "exact",
        "ste": "ste",
        "frozen": "frozen",
        TAUGHT: "exact",
        TEXT: "exact",
    }
    return Config(
        distill=load_config(None, "efx").distill if mode in (TAUGHT, TEXT) else DistillConfig(),
        model=ModelConfig(compute_dtype="bfloat16"),
        lora=LoraConfig(rank=RANK, alpha=ALPHA),
        prune=PruneConfig(mask_forward=modes[mode]),
        train=TrainConfig(batch_size=batch, remat=remat),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True)
    answer(measure, parser.parse_args().case)
