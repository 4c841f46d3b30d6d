"""A prune event of published shapes with random weights: calibration, score, selection and recovery.

    python benchmarks/prune_event.py [--models llama-2-7b ...] [--rows 128] [--length 2048] [--out prune_event.json]

On a CPU: `--models smollm2-135m --rows 4 --length 128`. ForeSight scores in row groups, 50 %, adapters of rank 8. Every
case runs in its own process: an event as in a run (`none` and `pbs` collect statistics first, `gram_pbs` and
`admm` block by block), first with compilation and then `--repeats` times. Rows of a case: `event_RECOVERY`, its seconds
beside the floor, `ratio` to `event_none`; `calibration_RECOVERY`, the part for the passes over the tokens;
`blocks_RECOVERY`, the part for score, selection and recovery; `event_memory_RECOVERY`, peak bytes on a GPU. Block by
block the two parts cannot be separated from outside: there the second is the time of one block's program on made-up
statistics times L, and the first is the rest.

Floors: FLOPs at 790 TFLOP/s in bfloat16, for what this program computes in float32 also at the 49 that plain float32
reaches, and bytes at 4.3 TB/s (an H100 or H200). A case that cannot run is a row with the reason.
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import answer, failed, run_case
from random_model import MODELS, RANK, peak_memory, random_adapters, random_masks, random_params, shape_config
from rows import keep, row

from efx_jax.config import PruneConfig, Recovery
from efx_jax.config_event import needs_gram
from efx_jax.model.attention import choose_attention
from efx_jax.model.decoder import LinearOptions
from efx_jax.model.spec import ModelSpec, linear_shapes, spec_from_config
from efx_jax.pruning.blockwise import prune_event_blockwise
from efx_jax.pruning.event import block_before, prune_event, prune_one
from efx_jax.pruning.event_plan import plan_event
from efx_jax.pruning.statistics import Statistics, batch_statistics, collect_statistics
from efx_jax.training.accounting import event_flops
from efx_jax.training.devices import find_device

RECOVERIES: tuple[Recovery, ...] = ("none", "pbs", "gram_pbs", "admm")
MATMUL_RATE, FLOAT32_RATE, COPY_RATE = 790e12, 49e12, 4.3e12
# Bytes per weight that score and 4-bit selection move in float32, and that diagonal PBS reads.
SCORE_BYTES, SELECT_BYTES, PBS_BYTES = 10, 32, 2
DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one case asks of its process."""

    model: str
    recovery: Recovery
    rows: int
    length: int
    calibration_tokens: int
    masked: bool
    repeats: int

    @property
    def config(self) -> PruneConfig:
        return PruneConfig(sparsity=0.5, score="foresight", group="row", recovery=self.recovery)


def main() -> None:
    arguments = parse()
    if arguments.case:
        answer(measure, arguments.case)
        return
    for model in arguments.models:
        name = model.rstrip("/").rpartition("/")[2]
        plain: float | None = None
        for recovery in arguments.recoveries:
            sizes = (arguments.rows, arguments.length, arguments.calibration_tokens)
            work = Work(model, recovery, *sizes, arguments.masked, arguments.repeats)
            found = run_case("prune_event.py", dataclasses.asdict(work), arguments.limit)
            if "error" in found:
                keep(arguments.out, [failed(f"event_{recovery} {name}", "seconds", found["error"])])
                continue
            keep(arguments.out, report(work, name, found, plain))
            plain = found["seconds"] if recovery == "none" else plain


def report(work: Work, name: str, found: Mapping[str, Any], plain: float | None) -> list[dict[str, Any]]:
    """The rows of one case."""
    recovery = work.recovery
    sizes = {"rows": work.rows, "length": work.length, "masks_in_force": work.masked, "device": found["device"]}
    spec = spec_from_config(shape_config(work.model))
    floor = floors(spec, work) if found["peak_rate"] == 989e12 else {}
    ratio = found["seconds"] / plain if plain else None
    first = {"first_seconds": found["first_seconds"], "repeats": work.repeats}
    rows = [
        row(f"event_{recovery} {name}", found["seconds"], "seconds", ratio, "event_none", **first, **floor, **sizes),
        row(f"calibration_{recovery} {name}", found["calibration"], "seconds", None, "", **sizes),
        row(f"blocks_{recovery} {name}", found["blocks"], "seconds", None, "", blocks=spec.num_layers, **sizes),
    ]
    if found["peak_bytes"] is not None:
        rows.append(row(f"event_memory_{recovery} {name}", found["peak_bytes"], "bytes", None, "", **sizes))
    return rows


def floors(spec: ModelSpec, work: Work) -> dict[str, float]:
    """The least seconds that the event can take on an H100 or H200."""
    tokens = work.rows * work.length
    flops = event_flops(spec, work.config, RANK, tokens, work.length)
    weights = spec.num_layers * sum(math.prod(shape) for shape in linear_shapes(spec).values())
    moved = weights * (SCORE_BYTES + SELECT_BYTES + (PBS_BYTES if work.recovery == "pbs" else 0))
    float32 = flops.grams + flops.surgeons
    rest = flops.passes / MATMUL_RATE + moved / COPY_RATE
    found = {"floor_seconds": round(rest + float32 / MATMUL_RATE, 3)}
    return found | {"floor_seconds_in_float32": round(rest + float32 / FLOAT32_RATE, 3)}


def measure(case: Mapping[str, Any]) -> dict[str, Any]:
    """One process: weights, adapters, tokens; then the event again and again."""
    work = Work(**case)
    spec = spec_from_config(shape_config(work.model))
    device = find_device("", 1)
    params = random_params(jax.random.key(0), spec, DTYPE)
    adapters = random_adapters(jax.random.key(1), params, spec)
    masks = random_masks(jax.random.key(2), spec) if work.masked else None
    model = jax.block_until_ready((params, adapters, masks))
    batches = calibration_batches(work, spec)
    first = event(model, batches, spec, work.config)
    taken = [event(model, batches, spec, work.config) for _ in range(work.repeats)]
    peak = peak_memory()
    total = statistics.median(sum(parts) for parts in taken)
    if needs_gram(work.config):
        blocks = spec.num_layers * block_seconds(model, spec, work.config)
        calibration = max(0.0, total - blocks)
    else:
        calibration, blocks = (statistics.median(parts) for parts in zip(*taken, strict=True))
    return {
        "seconds": total,
        "first_seconds": round(sum(first), 3),
        "calibration": calibration,
        "blocks": blocks,
        "peak_bytes": peak,
        "peak_rate": device.peak,
        "device": device.name,
    }


def event(model: Any, batches: Sequence[Any], spec: ModelSpec, config: PruneConfig) -> tuple[float, float]:
    """Seconds of the calibration and of the rest; an event block by block counts all of them as the rest."""
    params, adapters, masks = model
    how: Any = {"compute_dtype": DTYPE, "attention_path": choose_attention(spec, DTYPE)}
    began = time.perf_counter()
    if needs_gram(config):
        outcome = prune_event_blockwise(params, adapters, masks, batches, None, spec, config, packed=True, **how)
        jax.block_until_ready(outcome)
        return 0.0, time.perf_counter() - began
    stats = collect_statistics(params, batches, spec, adapters, masks, **how)
    jax.block_until_ready(stats)
    calibrated = time.perf_counter()
    jax.block_until_ready(prune_event(params, adapters, masks, stats, None, spec, config, packed=True))
    return calibrated - began, time.perf_counter() - calibrated


def block_seconds(model: Any, spec: ModelSpec, config: PruneConfig, repeats: int = 3) -> float:
    """Median seconds of score, selection and recovery of one block, with statistics of uncorrelated inputs."""
    params, adapters, masks = model
    plan = plan_event(params, adapters, masks, None, spec, config)
    layer, memory = block_before(plan, 0)
    stats = made_up_statistics(params, spec)
    seconds = []
    for _ in range(repeats + 1):
        jax.block_until_ready((layer, stats))
        began = time.perf_counter()
        jax.block_until_ready(prune_one(plan, 0, layer, stats, memory))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def made_up_statistics(params: Mapping[str, Any], spec: ModelSpec) -> Statistics:
    """One block's statistics: every energy 1, every Gram the identity."""
    tokens, lengths = jnp.zeros((1, 8), jnp.int32), jnp.full(1, 8)
    shapes: Any = jax.eval_shape(
        lambda params: batch_statistics(params, tokens, lengths, spec, None, None, LinearOptions(), "xla", True), params
    )
    return Statistics(
        energy={name: jnp.ones(leaf.shape[1:], jnp.float32) for name, leaf in shapes.energy.items()},
        gram={name: jnp.eye(leaf.shape[-1], dtype=jnp.float32) for name, leaf in shapes.gram.items()},
        tokens=jnp.float32(1),
    )


def calibration_batches(work: Work, spec: ModelSpec) -> list[dict[str, Any]]:
    """Random tokens in batches as a run forms them."""
    size = max(1, work.calibration_tokens // work.length)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (work.rows, work.length), np.int32)
    parts = [tokens[start : start + size] for start in range(0, work.rows, size)]
    return [{"tokens": part, "lengths": np.full(len(part), work.length, np.int32)} for part in parts]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A prune event of published shapes with random weights.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names in configs/shapes, or folders")
    parser.add_argument("--recoveries", nargs="+", choices=RECOVERIES, default=list(RECOVERIES))
    parser.add_argument("--rows", type=int, default=PruneConfig.calibration_rows, help="calibration rows")
    parser.add_argument("--length", type=int, default=PruneConfig.calibration_length, help="tokens of a row")
    parser.add_argument(
        "--calibration-tokens", type=int, default=PruneConfig.calibration_tokens, help="tokens of a calibration batch"
    )
    parser.add_argument("--masked", action="store_true", help="a later event: random masks are in force")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900, help="seconds that a case may take")
    parser.add_argument("--out", default="")
    parser.add_argument("--case", default="", help="used by the benchmark itself")
    return parser.parse_args()


if __name__ == "__main__":
    main()
