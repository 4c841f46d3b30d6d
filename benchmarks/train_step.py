"""Training steps of published shapes with random weights: plain LoRA and every way to train under a 50 % mask.

`taught` is `exact` with the base as a teacher of the tokens without a label, as in the preset `efx`. `--labels` sets
how many tokens have one. `text` is the same on rows without labels, which end where the teacher stops reading.

    python benchmarks/train_step.py [--models llama-2-7b ...] [--batch 16] [--length 2048] [--out train_step.json]

On a CPU: `--models smollm2-135m --batch 2 --length 512 --together`. Every case runs in its own process, so that
its peak memory is its own. With `--together` the modes of a model share one and take turns: on a shared machine
ratios mean more that way; the peak is then the compiler's. A case that does not fit gets a row that says so, and
is tried again with half as many sequences per forward pass.

Rows of a model, as they are measured:

- `matmul`: TFLOP/s of `[T,D] x [F,D]` in bfloat16, measured in the process of the first case before its weights exist.
- `step_MODE`: seconds of an update, `ratio` to `step_plain` of the same remat. FLOPs as `efx_jax.training.accounting`
  counts them. `mfu` is the mode's FLOPs without recomputation over the device's bfloat16 peak, `mfu_of_matmul` the
  same over the rate measured in the same process; `hfu` includes recomputation. `floor_seconds`: all FLOPs at 790
  TFLOP/s, which an H100 or H200 is taken to reach.
- `memory_MODE`: peak bytes, `ratio` to plain's plus the packed masks.
- `step_peft`: transformers + peft (torch) on the same device, see `peft_step.py`; `step_plain_beside_peft` compares.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from cases import failed, out_of_memory, run_case
from our_step import TAUGHT, TEXT, Work, mode_config
from random_model import ALPHA, MODELS, RANK, shape_config
from rows import keep, row

from efx_jax.config import Remat
from efx_jax.masks import packed_shape
from efx_jax.model.spec import LINEARS, ModelSpec, param_shapes, spec_from_config
from efx_jax.training.accounting import flops_per_step, flops_per_token
from efx_jax.training.distillation import positions_read

MODES = ("plain", "exact", "ste", "frozen")
REACHABLE = 790e12  # bfloat16 FLOP/s of large matmuls on an H100 or H200
TORCH_VARIANTS = tuple(
    {"checkpointing": checkpointing, "adapters": adapters}
    for adapters in ("float32", "bfloat16")
    for checkpointing in (False, True)
)


def main() -> None:
    arguments = parse()
    for model in arguments.models:
        print(json.dumps({"model": model}), flush=True)
        seconds: dict[tuple[str, str], float] = {}
        on_gpu = False
        for remat in arguments.remat:
            groups = [arguments.modes] if arguments.together else [[mode] for mode in arguments.modes]
            peaks: dict[str, int] = {}
            for modes in groups:
                found = run_ours(model, modes, remat, arguments)
                on_gpu = on_gpu or found.get("platform") == "gpu"
                report(model, modes, remat, found, seconds, peaks, arguments)
        if arguments.peft:
            report_peft(model, seconds, on_gpu, arguments)


def run_ours(model: str, modes: list[str], remat: Remat, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process finds for these modes, halving the sequences per forward pass while they do not fit."""
    micro = arguments.micro_batch or arguments.batch
    while True:
        work = Work(model, modes, remat, arguments.batch, arguments.length, micro, arguments.repeats, arguments.labels)
        found = run_case("our_step.py", dataclasses.asdict(work), arguments.limit)
        if not out_of_memory(found) or micro == 1:
            return {"micro_batch": micro} | found
        name = f"no_fit_{'_'.join(modes)} {place(model, remat)} {micro} sequences"
        keep(arguments.out, [failed(name, "seconds", found["error"], micro_batch=micro)])
        micro //= 2


def report(
    model: str,
    modes: list[str],
    remat: Remat,
    found: dict[str, Any],
    seconds: dict[tuple[str, str], float],
    peaks: dict[str, int],
    arguments: argparse.Namespace,
) -> None:
    """The rows of one process; `seconds` and `peaks` collect what later rows compare with."""
    where = place(model, remat)
    sizes = {
        "batch": arguments.batch,
        "length": arguments.length,
        "labels": arguments.labels,
        "micro_batch": found["micro_batch"],
    }
    if "error" in found:
        rows = [failed(f"step_{mode} {where}", "seconds", found["error"], **sizes) for mode in modes]
        keep(arguments.out, rows)
        return
    if not seconds:
        rate = found["matmul_rate"]
        details = {"of_peak": part(rate, found["peak_rate"]), "device": found["device"]}
        keep(arguments.out, [row(f"matmul {name_of(model)}", rate / 1e12, "TFLOP/s", None, "", **details)])
    spec = spec_from_config(shape_config(model))
    for mode, result in found["modes"].items():
        if "error" in result:
            keep(arguments.out, [failed(f"step_{mode} {where}", "seconds", result["error"], **sizes)])
            continue
        time_taken = result["seconds"]
        seconds[mode, remat] = time_taken
        plain = seconds.get(("plain", remat)) if mode != "plain" else None
        ratio = time_taken / plain if plain else None
        details = sizes | speeds(spec, mode, remat, found, result, arguments) | result["spread"]
        keep(arguments.out, [row(f"step_{mode} {where}", time_taken, "seconds", ratio, "step_plain", **details)])
        peaks[mode] = result["peak_bytes"]
        beside = peaks["plain"] + mask_bytes(spec) if mode != "plain" and "plain" in peaks else None
        ratio = result["peak_bytes"] / beside if beside else None
        details = sizes | {"measured_by": result["peak_by"], "device": found["device"]}
        against = "memory_plain + packed masks"
        keep(arguments.out, [row(f"memory_{mode} {where}", result["peak_bytes"], "bytes", ratio, against, **details)])


def speeds(
    spec: ModelSpec,
    mode: str,
    remat: Remat,
    found: Mapping[str, Any],
    result: Mapping[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """What a row has beside the seconds of a step."""
    tokens, time_taken = arguments.batch * arguments.length, result["seconds"]
    needed = step_flops(spec, mode, "none", arguments, found["micro_batch"])
    computed = step_flops(spec, mode, remat, arguments, found["micro_batch"])
    on_hopper = found["peak_rate"] == 989e12
    return {
        "tokens_per_second": round(tokens / time_taken, 1),
        "mfu": part(needed / time_taken, found["peak_rate"]),
        "mfu_of_matmul": part(needed / time_taken, found["matmul_rate"]),
        "hfu": part(computed / time_taken, found["peak_rate"]),
        "hfu_of_matmul": part(computed / time_taken, found["matmul_rate"]),
        "matmul_tflops": round(found["matmul_rate"] / 1e12, 4),
        "floor_seconds": round(computed / REACHABLE, 4) if on_hopper else None,
        "compile_seconds": round(result["compile_seconds"], 2),
        "first_loss": result["first_loss"],
        "attention": found["attention"],
        "device": found["device"],
    }


def step_flops(spec: ModelSpec, mode: str, remat: Remat, arguments: argparse.Namespace, micro_batch: int) -> float:
    """FLOPs of one update; the head counts only the tokens with a label."""
    config = mode_config(mode, arguments.batch, remat)
    masked, length, labels = mode != "plain", arguments.length, arguments.labels
    if mode == TEXT:
        length, labels = positions_read(config.distill.prefix_share, length), 0.0
        config = dataclasses.replace(config, distill=dataclasses.replace(config.distill, prefix_share=1.0))
    tokens, passes = arguments.batch * length, arguments.batch // micro_batch
    without_label = (1 - labels) * tokens * flops_per_token(spec, config, length, masked).head
    return flops_per_step(spec, config, length, passes, masked) - without_label


def report_peft(
    model: str, seconds: Mapping[tuple[str, str], float], on_gpu: bool, arguments: argparse.Namespace
) -> None:
    """Rows of transformers + peft, and of our fastest plain step beside its fastest."""
    taken: dict[str, float] = {}
    shared = {"config": shape_config(model), "batch": arguments.batch, "length": arguments.length, "gpu": on_gpu}
    shared |= {"repeats": arguments.repeats, "rank": RANK, "alpha": ALPHA, "targets": list(LINEARS)}
    for variant in TORCH_VARIANTS:
        found = run_case("peft_step.py", {**shared, **variant}, arguments.limit)
        remembered = "checkpointing" if variant["checkpointing"] else "no checkpointing"
        name = f"step_peft {name_of(model)} {variant['adapters']} adapters, {remembered}"
        if "seconds" not in found:
            keep(arguments.out, [failed(name, "seconds", found["error"])])
            if found.get("absent"):
                return
            continue
        taken[name] = time_taken = found.pop("seconds")
        rate = {"tokens_per_second": round(arguments.batch * arguments.length / time_taken, 1)}
        keep(arguments.out, [row(name, time_taken, "seconds", None, "", **rate, **found)])
    ours = {name: time_taken for name, time_taken in seconds.items() if name[0] == "plain"}
    if ours and taken:
        best, rival = min(ours, key=lambda name: ours[name]), min(taken, key=lambda name: taken[name])
        rate = {"tokens_per_second": round(arguments.batch * arguments.length / ours[best], 1)}
        name, ratio = f"step_plain_beside_peft {name_of(model)}", ours[best] / taken[rival]
        keep(arguments.out, [row(name, ours[best], "seconds", ratio, rival, remat=best[1], **rate)])


def mask_bytes(spec: ModelSpec) -> int:
    layers = param_shapes(spec)["layers"]
    return sum(math.prod(packed_shape(layers[name])) for name in LINEARS)


def part(rate: float, whole: float | None) -> float | None:
    return round(rate / whole, 4) if whole else None


def name_of(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def place(model: str, remat: str) -> str:
    return f"{name_of(model)} remat {remat}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps of published shapes with random weights.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names in configs/shapes, or folders")
    parser.add_argument("--modes", nargs="+", choices=(*MODES, TAUGHT, TEXT), default=list(MODES))
    parser.add_argument("--remat", nargs="+", choices=("none", "linears", "block"), default=["linears", "block"])
    parser.add_argument("--batch", type=int, default=16, help="sequences of one update")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences of a forward pass; 0: as many as fit")
    parser.add_argument("--labels", type=float, default=1.0, help="share of the tokens that carry loss, above 0")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--together", action="store_true", help="the modes of a model share a process and take turns")
    parser.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True, help="also transformers + peft")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a case may take")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    most = 0.9 if TAUGHT in arguments.modes else 1.0
    if not 0 < arguments.labels <= most:
        parser.error(f"--labels: expected above 0 and at most {most} with these modes, found {arguments.labels}")
    return arguments


if __name__ == "__main__":
    main()
