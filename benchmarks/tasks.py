"""The paper's tasks on SmolLM2-135M: the base model, dense LoRA, presets paper and efx, under two protocols.

    python benchmarks/tasks.py --root DATA --work DIR [--only health] [--out docs/results/tasks.json]

It uses the health and the legal mix of the files under DATA, `configs/smollm2_135m_*.yaml` for everything but what
`MODELS` sets, and a fixed sample of 200 test rows of each task. Results finished in DIR are not computed again, so the
command may be interrupted. `likelihood` also measures perplexity; `sampled` answers every row twice.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rows import keep

PROJECT = Path(__file__).parent.parent
TASKS = {
    "health": ("pubmedqa", "evidence_inference", "hqs"),
    "legal": ("casehold", "contract_nli", "billsum"),
}
TEXTS = {"health": "text_medical/paragraphs.jsonl", "legal": "text_legal/sections.jsonl"}
# Arguments of train.py besides the config; None: no training.
MODELS = {
    "base": None,
    "dense": ("--prune.sparsity", "0"),
    "paper": ("--preset", "paper"),
    "efx": (),
}
# The run's own evaluations are not needed here.
QUIET = ("--eval.rows", "4", "--eval.text_tokens", "1024")
ANSWERS = ("--rows", "200", "--format", "alpaca", "--max-length", "1024", "--batch-size", "32")
PROTOCOLS = {
    "likelihood": ("--window", "1024", "--text-tokens", "50000"),
    "sampled": ("--runs", "2"),
}


def main() -> None:
    arguments = parse()
    work = Path(arguments.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    for mix in arguments.only:
        for model, flags in MODELS.items():
            if flags is not None:
                train(work, mix, model, (*flags, *arguments.train), arguments.root)
    for protocol in PROTOCOLS:
        for mix in arguments.only:
            # The others are compared with the dense model.
            for model in ("dense", *(name for name in MODELS if name != "dense")):
                evaluate(work, mix, model, protocol, arguments)
                keep(arguments.out, [found(work, mix, model, protocol, arguments.train)])


def train(work: Path, mix: str, model: str, flags: tuple[str, ...], root: str) -> None:
    folder = work / f"{mix}_{model}"
    if (folder / "summary.json").exists():
        return
    config = PROJECT / "configs" / f"smollm2_135m_{mix}.yaml"
    run(
        ["train.py", "--config", str(config), "--output", str(folder), "--data.root", root, *flags, *QUIET],
        folder.with_suffix(".log"),
    )


def evaluate(work: Path, mix: str, model: str, protocol: str, arguments: argparse.Namespace) -> None:
    folder = work / f"{mix}_{model}_{protocol}"
    if (folder / "summary.json").exists():
        return
    path = "quickstart" if MODELS[model] is None else str(work / f"{mix}_{model}")
    flags = [*ANSWERS, "--protocol", protocol, *PROTOCOLS[protocol], "--root", arguments.root, "--output", str(folder)]
    if protocol == "likelihood":
        flags += ["--text", TEXTS[mix]]
    if model != "dense":
        flags += ["--relative-to", str(work / f"{mix}_dense_{protocol}")]
    run(["-m", "efx_jax.evaluation", path, "--tasks", *TASKS[mix], *flags], folder.with_suffix(".log"))


def run(command: list[str], log: Path) -> None:
    print(f"{log.stem} ...", file=sys.stderr, flush=True)
    with log.open("w") as output:
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        ended = subprocess.run(
            [sys.executable, *command], cwd=PROJECT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    if ended.returncode:
        raise SystemExit(f"{log.stem} ended with {ended.returncode}: see {log}")


def found(work: Path, mix: str, model: str, protocol: str, settings: list[str]) -> dict[str, Any]:
    """The row of one evaluation: its summary, and the time its training took."""
    summary = json.loads((work / f"{mix}_{model}_{protocol}" / "summary.json").read_text())
    row: dict[str, Any] = {"name": f"{mix} {model} {protocol}", "evaluation_seconds": summary["seconds"]}
    if MODELS[model] is not None:
        trained = json.loads((work / f"{mix}_{model}" / "summary.json").read_text())
        row |= {
            "settings": settings,
            "sparsity": {name: sum(layers) / len(layers) for name, layers in trained["sparsity"].items()},
            "tokens": trained["tokens"],
            "training_seconds": trained["seconds"],
            "peak_memory_mib": trained["peak_memory_mib"],
        }
    relative = summary["relative"] and {name: summary["relative"][name] for name in ("value", "interval")}
    row |= {"perplexity": summary["perplexity"], "relative": relative, "tasks": summary["tasks"]}
    print(json.dumps({"name": row["name"], "perplexity": row["perplexity"], "relative": relative}), flush=True)
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The paper's tasks on SmolLM2-135M.")
    parser.add_argument("--root", required=True, help="folder of the data files")
    parser.add_argument("--work", required=True, help="folder of the runs and their evaluations")
    parser.add_argument("--only", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="last: more flags of train.py, for all")
    parser.add_argument("--out", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
