"""Finding the lowest half of a score: our bisection on float bits against sorting, for row and matrix groups.

    python benchmarks/selection.py [--shapes 11008x4096 4096x11008] [--out selection.json]

On a CPU: `--shapes 1536x576 576x1536`. Every rival marks the same entries, ties broken by index, which is checked on
scores with ties; the time is that of marking. Rivals take turns. `ratio` is their time over that of `ours`, which
finds 4 bits per round on a GPU and 1 on a CPU; `bisect_4` and `bisect_1` force either. `floor_ms`: the bytes that eight
passes over 32-bit scores read, at 4.3 TB/s. A rival that cannot run is a row with the reason.
"""

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from cases import failed, reason
from rows import interleaved, keep, median, row, spread

# `_lowest`: in the public functions the platform chooses the number of bits per round.
from efx_jax.pruning.selection import WHOLE, _lowest, drop_count, lowest, score_bits

Mark = Callable[[jax.Array], jax.Array]
COPY_RATE, PASSES = 4.3e12, 8


def main() -> None:
    arguments = parse()
    for shape in arguments.shapes:
        for group in arguments.groups:
            score = ties(jax.random.key(0), shape)
            keep(arguments.out, compare(score, group, arguments))


def compare(score: jax.Array, group: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one matrix and group."""
    entries = score.shape[1] if group == "row" else score.size
    count = drop_count(arguments.sparsity, entries)
    where = f"{score.shape[0]}x{score.shape[1]} {group}"
    runs: dict[str, Callable[[], Any]] = {}
    rows, expected = [], None
    for name, mark in rivals(group, count).items():
        compiled = jax.jit(mark)
        try:
            marked = jax.block_until_ready(compiled(score))
        except Exception as error:  # out of memory, or an unsupported size: the others go on
            rows.append(failed(f"{name} {where}", "ms", reason(error)))
            continue
        expected = marked if expected is None else expected
        if not bool(jnp.array_equal(marked, expected)):
            rows.append(failed(f"{name} {where}", "ms", "it marks other entries than ours"))
            continue
        runs[name] = functools.partial(lambda compiled: jax.block_until_ready(compiled(score)), compiled)
    taken = interleaved(runs, arguments.repeats)
    ours = median(taken["ours"])
    floor = {"floor_ms": 1e3 * PASSES * 4 * score.size / COPY_RATE, "device": jax.devices()[0].device_kind}
    for name, times in taken.items():
        details = {"dropped": count, **floor, **spread(times)}
        ratio = median(times) / ours if name != "ours" else None
        rows.append(row(f"{name} {where}", 1e3 * median(times), "ms", ratio, "ours", **details))
    return rows


def rivals(group: str, count: int) -> dict[str, Mark]:
    """Ways to mark the `count` lowest of every group; of equal scores, the lower index first."""
    dims = 1 if group == "row" else 2

    def bisect(score: jax.Array, digit: int) -> jax.Array:
        return _lowest(score_bits(score), jnp.int32(count), dims, WHOLE, digit)

    def grouped(mark: Mark) -> Mark:
        return mark if group == "row" else lambda score: mark(score.reshape(1, -1)).reshape(score.shape)

    return {
        "ours": lambda score: lowest(score_bits(score), count, dims),
        "bisect_4": functools.partial(bisect, digit=4),
        "bisect_1": functools.partial(bisect, digit=1),
        "sort_uint32": grouped(lambda score: by_order(score_bits(score), count)),
        "sort_float": grouped(lambda score: by_order(score, count)),
        "argsort": grouped(lambda score: scatter(jnp.argsort(score, axis=1, stable=True)[:, :count], score.shape)),
        "top_k": grouped(lambda score: scatter(jax.lax.top_k(-score, count)[1], score.shape)),
    }


def by_order(values: jax.Array, count: int) -> jax.Array:
    """Marks by the order statistic of sorted keys: all entries below it, and as many equal ones as are left."""
    threshold = jnp.sort(values, axis=1)[:, count - 1 : count]
    below, equal = values < threshold, values == threshold
    spare = count - jnp.sum(below, axis=1, keepdims=True)
    return below | (equal & (jnp.cumsum(equal, axis=1) <= spare))


def scatter(chosen: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Marks the columns `chosen [G,count]` of every row."""
    marked = jnp.zeros(shape, bool)
    return marked.at[jnp.arange(shape[0])[:, None], chosen].set(True)


def ties(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Scores of normal weights rounded to bfloat16, most of which have a tie in their row."""
    return jnp.abs(jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16).astype(jnp.float32)


def parse_shape(text: str) -> tuple[int, int]:
    out_dim, in_dim = map(int, text.split("x"))
    if math.prod((out_dim, in_dim)) >= 2**31:
        raise ValueError(text)
    return out_dim, in_dim


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time of exact selection.")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[(11008, 4096), (4096, 11008)])
    parser.add_argument("--groups", nargs="+", choices=("row", "matrix"), default=["row", "matrix"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
