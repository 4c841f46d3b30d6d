"""What a run might have left, made up, with text that would act if a page let it in."""

import json
from pathlib import Path
from typing import Any

from efx_jax.config import Config
from efx_jax.config_io import to_yaml

EVIL = "</pre><script>alert('x')</script><img src=http://evil.example/a.png onerror=\"b\"> & \x07\ud800 \u202eback"


def task(accuracy: float) -> dict[str, Any]:
    """The result of a task with labels, of 30 rows."""
    return {
        "protocol": "likelihood",
        "runs": 1,
        "rows": 30,
        "note": "",
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.1, accuracy + 0.1],
        "macro_f1": accuracy / 2,
        "macro_f1_interval": None,
        "constant_accuracy": 0.25,
        "constant_macro_f1": 0.1,
    }


def summary(layers: int = 3) -> dict[str, Any]:
    """summary.json of a run with one event."""
    results = {
        name: {
            "perplexity": {"value": value, "interval": [value - 1, value + 1], "tokens": 900},
            "tasks": {"pubmedqa": task(share)},
        }
        for name, value, share in (
            ("base", 20.0, 0.4),
            ("dense LoRA, step 4", 10.0, 0.7),
            ("sparse expert", 12.0, 0.625),
        )
    }
    return {
        "results": results,
        "data": {
            "train": {"rows": 1200, "shortened": 3, "tasks": {"pubmedqa": {"drawn": 1200}}},
            "test": {"pubmedqa": {"rows": 500, "scored": 30, "shortened": 0}},
        },
        "sparsity": {name: [0.4 + 0.05 * layer for layer in range(layers)] for name in ("q_proj", "down_proj")},
        "entries": {"q_proj": 64, "down_proj": 64},
        "steps": 40,
        "tokens": 81920,
        "best": None,
        "events": [{"step": 4, "sparsity": 0.5, "last": True}],
        "seconds": {"load": 1.5, "train": 30.0, "prune": 8.5},
        "peak_memory_mib": 1234.5,
        "memory_mib": {"load": 300.0, "train": 1234.5},
        "device": "cpu",
        "versions": {"python": "3.12.1", "jax": "0.12.0"},
        "command": "python train.py --output '<b>runs</b>'",
        "seed": 0,
    }


def metrics(steps: int) -> list[dict[str, Any]]:
    """metrics.jsonl with one loss that was not finite."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 2048 * step, "loss": 3.0 - step / steps, "entropy": 2.0, "learning_rate": 1e-3}
        rows.append(row | {"grad_norm": 0.5, "sparsity": 0.5 * (step > 4), "tokens_per_second": 100.0 + step})
    rows[steps // 2]["loss"] = None
    return rows


def samples() -> list[dict[str, Any]]:
    """samples.jsonl: a row with labels and one of free text."""
    chosen = [{"answer": word, "prediction": word, "margin": 0.5} for word in ("no", "yes")]
    written = [{"answer": f"{EVIL} {number}", "rougeL": number / 2} for number in range(2)]
    models = ("dense LoRA, step 4", "sparse expert")
    return [
        {
            "task": "pubmedqa",
            "row": 0,
            "origin": "",
            "prompt": f"{EVIL} Is it so?",
            "gold": "yes",
            "answers": dict(zip(models, chosen, strict=True)),
        },
        {
            "task": "hqs",
            "row": 4,
            "origin": "",
            "prompt": "Sum up.",
            "gold": EVIL,
            "answers": dict(zip(models, written, strict=True)),
        },
    ]


def leave_run(folder: Path, config: Config | None = None, **changed: Any) -> Path:
    """Writes a run's files but for its weights; `changed` replaces entries of the summary."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config or Config()))
    (folder / "summary.json").write_text(json.dumps(summary() | changed))
    evaluations = [
        {"step": 20, "perplexity": 13.0, "pubmedqa.accuracy": 0.6},
        {"step": 40, "perplexity": 12.0, "pubmedqa.accuracy": 0.625},
    ]
    for name, rows in (("metrics", metrics(40)), ("evaluations", evaluations), ("samples", samples())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
