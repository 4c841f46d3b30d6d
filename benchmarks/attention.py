"""Causal attention alone: this program's XLA path and cuDNN's against attention with a mask tensor.

    python benchmarks/attention.py [--models llama2_7b ...] [--batch 16] [--length 2048] [--out attention.json]

On a CPU: `--models smollm2_135m --batch 2 --length 512`. One JSON object per row as it is measured; `ratio` is the time
over that of `full_mask` (`jax.nn.dot_product_attention` with an explicit mask in XLA), `ratio_to_xla` that over our
XLA path.
TFLOP/s count the causal half of the scores. Packed rows hold eight equal segments. A case that cannot run (cuDNN
without a GPU, a mask too large for the memory) is a row with the reason.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from cases import failed, reason
from rows import keep, row

from efx_jax.model.attention import attention, visible_keys

SHAPES = {  # query heads, key/value heads, head width
    "llama2_7b": (32, 32, 128),
    "llama31_8b": (32, 8, 128),
    "qwen3_8b": (32, 8, 128),
    "smollm2_135m": (9, 3, 64),
}
SEGMENTS = 8
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def main() -> None:
    arguments = parse()
    for model in arguments.models:
        for rows_are, segments in (("plain", None), ("packed", segment_ids(arguments.batch, arguments.length))):
            for backward in (False, True):
                times: dict[str, float] = {}
                for name, attend in implementations(segments, arguments.length).items():
                    case = f"{model} {rows_are} {'forward+backward' if backward else 'forward'} {name}"
                    found = measure(case, SHAPES[model], name, attend, backward, times, arguments)
                    keep(arguments.out, [found])


def implementations(segments: jax.Array | None, length: int) -> dict[str, Attend]:
    """The ways to compute the same result; the first is the reference for all others."""
    found: dict[str, Attend] = {
        "full_mask": lambda q, k, v: full_mask(q, k, v, segments, length),
        "xla": lambda q, k, v: attention(q, k, v, segments),
    }
    if jax.default_backend() == "gpu":
        found["cudnn"] = lambda q, k, v: attention(q, k, v, segments, "cudnn")
    return found


def full_mask(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, length: int) -> jax.Array:
    """Attention that forms all scores and the mask as arrays, `[B,T,N*H]`."""
    mask = visible_keys(segments, 0, length)[:, None]
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
    return mixed.reshape(*q.shape[:2], -1).astype(jnp.float32)


def measure(
    case: str,
    sizes: tuple[int, int, int],
    name: str,
    attend: Attend,
    backward: bool,
    times: dict[str, float],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The row of one case: milliseconds, and the ratios to the earlier `times`, to which its own is added."""
    heads, kv_heads, width = sizes
    shape = {"batch": arguments.batch, "length": arguments.length, "heads": heads, "kv_heads": kv_heads, "width": width}
    try:
        seconds = timed(attend, shape, backward, arguments)
    except Exception as error:  # out of memory, or cuDNN refuses: the other cases go on
        return failed(case, "ms", reason(error), **shape)
    ratio = seconds / times["full_mask"] if "full_mask" in times else None
    to_xla = {"ratio_to_xla": round(seconds / times["xla"], 4)} if "xla" in times else {}
    times[name] = seconds
    flops = 2 * arguments.batch * heads * arguments.length**2 * width * (3.5 if backward else 1)
    details = {
        **to_xla,
        "tflops": round(flops / seconds / 1e12, 2),
        "dtype": arguments.dtype,
        "device": jax.devices()[0].device_kind,
    }
    return row(case, 1e3 * seconds, "ms", ratio, "full_mask", **details, **shape)


def timed(attend: Attend, shape: dict[str, int], backward: bool, arguments: argparse.Namespace) -> float:
    """Median seconds of one call."""
    keys = jax.random.split(jax.random.key(0), 3)
    counts = (shape["heads"], shape["kv_heads"], shape["kv_heads"])
    operands = [
        jax.random.normal(key, (shape["batch"], shape["length"], count, shape["width"]), arguments.dtype)
        for key, count in zip(keys, counts, strict=True)
    ]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend(q, k, v)))

    run = jax.jit(jax.grad(loss, (0, 1, 2)) if backward else attend)
    jax.block_until_ready(run(*operands))
    seconds = []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(*operands))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def segment_ids(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(1 + jnp.arange(length) * SEGMENTS // length, (batch, length))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time of causal attention, forward and backward.")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama2_7b", "llama31_8b", "qwen3_8b"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
