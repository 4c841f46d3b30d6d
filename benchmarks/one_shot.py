"""Masks and recovery without training: the perplexity of a model pruned once, for every relevant choice.

    python benchmarks/one_shot.py --data ori_pqal.json [--model quickstart] [--out docs/results/one_shot.json]

`--data` is PubMedQA's `ori_pqal.json`, or any text file with one document per line. The first half of
its documents (abstracts sorted by PMID) is for calibration, the second half for measurement. One JSON object per row;
`ratio` is perplexity over the dense model's.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rows import keep, row

from efx_jax.config import PruneConfig
from efx_jax.data.tokens import Tokenized, text_windows
from efx_jax.evaluation.perplexity import perplexity
from efx_jax.lora import init_lora, merge
from efx_jax.pruning.blockwise import prune_event_blockwise
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.output_gradient import output_gradient_energy
from efx_jax.pruning.statistics import collect_statistics
from efx_jax.weights.hf import load_pretrained, load_tokenizer

USUAL = 0.5
WANDA = PruneConfig(score="wanda", group="row")
GRAM_PBS = dataclasses.replace(WANDA, recovery="gram_pbs")
GATED = PruneConfig(
    score="foresight_gated", group="bounded", bound=0.2, row_targets=("v_proj", "down_proj"), admm_steps=20
)
LOSS = dataclasses.replace(GATED, score="foresight_loss", row_targets=())
GLOBAL = dataclasses.replace(LOSS, budget="global", budget_spread=0.3)
REFINED = dataclasses.replace(GLOBAL, recovery="admm", admm_refine=10)
SEQUENTIAL = dataclasses.replace(REFINED, sequential=True)
CASES: tuple[tuple[str, PruneConfig, int], ...] = (
    ("magnitude, row", dataclasses.replace(WANDA, score="magnitude"), 8),
    ("wanda, row", WANDA, 8),
    ("foresight, row", dataclasses.replace(WANDA, score="foresight"), 8),
    ("wanda, matrix", dataclasses.replace(WANDA, group="matrix"), 8),
    ("foresight, matrix", dataclasses.replace(WANDA, score="foresight", group="matrix"), 8),
    ("foresight_gated, bounded 0.2, v and down by row", GATED, 8),
    ("foresight_gated, bounded 0.2, all", dataclasses.replace(GATED, row_targets=()), 8),
    ("foresight_loss, bounded 0.2, all", LOSS, 8),
    ("foresight_loss, bounded 0.2, global within 0.3", GLOBAL, 8),
    ("wanda, row + pbs r 8", dataclasses.replace(WANDA, recovery="pbs"), 8),
    ("wanda, row + gram_pbs r 8", GRAM_PBS, 8),
    ("wanda, row + gram_pbs r 64", GRAM_PBS, 64),
    (
        "wanda, row + gram_pbs r 8, A from the spectrum",
        dataclasses.replace(GRAM_PBS, pbs_rounds=1),
        8,
    ),
    ("wanda, row + gram_pbs r 8, A and B by turns", dataclasses.replace(GRAM_PBS, pbs_rounds=4), 8),
    ("wanda, row + swaps", dataclasses.replace(WANDA, swaps=100), 8),
    ("wanda, row + swaps + admm", dataclasses.replace(WANDA, swaps=100, recovery="admm", admm_steps=20), 8),
    ("wanda, row + admm", dataclasses.replace(WANDA, recovery="admm", admm_steps=20), 8),
    ("foresight_gated, bounded 0.2, v and down by row + admm", dataclasses.replace(GATED, recovery="admm"), 8),
    ("foresight_loss, bounded 0.2, all + admm", dataclasses.replace(LOSS, recovery="admm"), 8),
    ("foresight_loss, bounded 0.2, global within 0.3 + admm", dataclasses.replace(GLOBAL, recovery="admm"), 8),
    (
        "foresight_loss, bounded 0.2, global within 0.3 + swaps + admm",
        dataclasses.replace(GLOBAL, swaps=100, recovery="admm"),
        8,
    ),
    ("foresight_loss, bounded 0.2, global within 0.3 + admm that refines", REFINED, 8),
    ("foresight_loss, bounded 0.2, global within 0.3 + admm that refines, sequential", SEQUENTIAL, 8),
    (
        "foresight_loss, bounded 0.2, global within 0.3 + admm that refines, half towards the dense path",
        dataclasses.replace(SEQUENTIAL, dense_path=0.5),
        8,
    ),
    (
        "foresight_loss, bounded 0.2, global within 0.3 + admm that refines, towards the dense path",
        dataclasses.replace(SEQUENTIAL, dense_path=1.0),
        8,
    ),
)


def main() -> None:
    arguments = parse()
    tokenizer = load_tokenizer(arguments.model)
    params, spec = load_pretrained(arguments.model)
    calibration_text, test_text = documents(arguments.data)
    calibration = text_windows(calibration_text, tokenizer, 512, 512 * arguments.calibration)
    test = text_windows(test_text, tokenizer, 512, 512 * arguments.test)
    sizes = {"calibration_tokens": count(calibration), "test_tokens": count(test), "window": 512}

    def measure(model: dict[str, Any]) -> float:
        return perplexity(model, test, spec, batch_size=4, compute_dtype=arguments.compute_dtype).value

    batches = [{"tokens": jnp.asarray(window.tokens)[None]} for window in calibration]
    stats = collect_statistics(params, batches, spec, gram=True, compute_dtype=arguments.compute_dtype)
    importance, _ = output_gradient_energy(params, batches, spec, compute_dtype=arguments.compute_dtype)
    dense = measure(params)
    keep(arguments.out, [report("dense", 0.0, dense, dense, 0.0, sizes)])
    chosen = [case for case in CASES if arguments.only in case[0]]
    for sparsity in arguments.sparsity:
        for name, config, rank in chosen:
            began = time.perf_counter()
            config = dataclasses.replace(config, sparsity=sparsity)
            adapters = init_lora(jax.random.key(0), params, spec, rank=rank, alpha=2 * rank)
            if config.sequential:
                # Its seconds include the calibration.
                dtype = arguments.compute_dtype
                event = prune_event_blockwise(
                    params, adapters, None, batches, None, spec, config, compute_dtype=dtype, importance=importance
                )
            else:
                event = prune_event(params, adapters, None, stats, None, spec, config, importance=importance)
            pruned = jax.block_until_ready(merge(*event[:3]))
            seconds = time.perf_counter() - began
            keep(arguments.out, [report(name, sparsity, measure(pruned), dense, seconds, sizes)])


def report(
    name: str, sparsity: float, value: float, dense: float, seconds: float, sizes: dict[str, int]
) -> dict[str, Any]:
    """The row of one result."""
    # A file has one row per name; names at the usual sparsity leave it out.
    case = name if sparsity in (0.0, USUAL) else f"{name}, {100 * sparsity:g} %"
    details = {"sparsity": sparsity, "event_seconds": round(seconds, 1), **sizes}
    return row(case, value, "perplexity", value / dense, "dense", **details)


def documents(path: str) -> tuple[list[str], list[str]]:
    """Calibration and test documents, disjoint."""
    text = Path(path).read_text()
    if path.endswith(".json"):
        rows = json.loads(text)
        texts = [" ".join(rows[key]["CONTEXTS"]) for key in sorted(rows)]
    else:
        texts = [line for line in text.splitlines() if line.strip()]
    half = len(texts) // 2
    return texts[:half], texts[half:]


def count(windows: list[Tokenized]) -> int:
    return sum(len(window.tokens) for window in windows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity after one prune event, without training.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[USUAL])
    parser.add_argument("--calibration", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--test", type=int, default=12, help="windows of 512 tokens")
    parser.add_argument("--compute-dtype", default="bfloat16")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--out", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
