"""Peak host memory and time of reading, writing, importing, exporting and packing a checkpoint of random weights.

    python benchmarks/streaming.py [--layers 24] [--width 1024] [--out docs/results/streaming.json]

Each runs in its own process. It measures the peak resident size above what the process had before and what
its arrays take at the end. One JSON object per row; `ratio` is memory over its limit, twice the largest stacked array
plus 500 MiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Imported here, so that its own size is not measured.
import orbax.checkpoint  # noqa: F401
from rows import keep, row

from efx_jax.config import MeshConfig
from efx_jax.model.rope import RopeSpec
from efx_jax.model.spec import ModelSpec, param_shapes, spec_from_config
from efx_jax.parallel.mesh import make_mesh
from efx_jax.weights.assemble import tree_bytes
from efx_jax.weights.convert import export_checkpoint, import_checkpoint
from efx_jax.weights.hf import load_pretrained, open_checkpoint, save_pretrained
from efx_jax.weights.packed import pack, unpack

# Each case -> the folders that it reads and writes, below the working folder.
CASES = {
    "load": ("model", ""),
    "load_sharded": ("model", ""),
    "load_as_bfloat16": ("model", ""),
    "save": ("model", "saved"),
    "save_sharded": ("model", "saved_sharded"),
    "import": ("model", "orbax"),
    "load_orbax": ("orbax", ""),
    "export": ("orbax", "exported"),
    "pack": ("model", "packed"),
    "load_packed": ("packed", ""),
    "unpack": ("packed", "unpacked"),
}
SLACK = 500 * 2**20


def main() -> None:
    arguments = parse()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="streaming.") as folder:
        keep(arguments.out, benchmark(Path(folder), arguments.layers, arguments.width))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--out", default="")
    parser.add_argument("--case", choices=CASES, help="used by the benchmark itself")
    parser.add_argument("--folder", type=Path, help="used by the benchmark itself")
    return parser.parse_args()


def benchmark(folder: Path, layers: int, width: int) -> list[dict[str, Any]]:
    """Two rows per case."""
    total, largest = make_checkpoint(folder / "model", shape(layers, width))
    limit = 2 * largest + SLACK
    sizes = {"layers": layers, "width": width, "checkpoint_bytes": total, "largest_stacked_bytes": largest}
    rows = []
    for case in CASES:
        found = run(case, folder)
        above, seconds = found["above"], found["seconds"]
        rows.append(row(f"{case}_memory", above, "bytes", above / limit, "2 x largest stacked + 500 MiB", **sizes))
        rows.append(row(f"{case}_time", seconds, "s", None, "", gigabytes_per_second=total / seconds / 1e9, **sizes))
    return rows


def run(case: str, folder: Path) -> dict[str, float]:
    """Runs one case in its own process, with four simulated devices."""
    command = [sys.executable, __file__, "--case", case, "--folder", str(folder)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def shape(layers: int, width: int) -> ModelSpec:
    """A LLaMA with MLP width 4 `width`."""
    return ModelSpec(
        model_type="llama",
        vocab_size=8 * width,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        rope=RopeSpec(),
    )


def make_checkpoint(folder: Path, spec: ModelSpec) -> tuple[int, int]:
    """Writes random float32 weights, half of the layers' matrices 0; returns the bytes of all and of the largest
    stacked array."""
    rng = np.random.default_rng(0)
    shapes = param_shapes(spec)
    params = jax.tree.map(
        lambda length: rng.standard_normal(length, np.float32), shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
    for leaf in params["layers"].values():
        # (Norms do not affect what is measured.)
        np.maximum(leaf, 0, out=leaf)
    save_pretrained(folder, params, spec)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)), max(leaf.nbytes for leaf in params["layers"].values())


def measure(case: str, folder: Path) -> dict[str, float]:
    """Runs one case; returns its seconds, and its bytes above those before it and those of the arrays it ends with."""
    src, dst = (folder / name for name in CASES[case])
    mesh = make_mesh(MeshConfig(fsdp=len(jax.devices()))) if case.endswith("sharded") else None
    dtype = "bfloat16" if case.endswith("bfloat16") else None
    loaded = load_pretrained(src, None, mesh) if case.startswith("save") else None
    arrays = 0
    # Resets the peak, so that it is the case's own (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    if loaded is not None:
        save_pretrained(dst, *loaded)
    elif case == "import":
        import_checkpoint(src, dst)
        source = open_checkpoint(src)
        arrays = tree_bytes(source, spec_from_config(source.config))
    elif case == "export":
        export_checkpoint(src, dst)
    elif case == "pack":
        pack(src, dst)
    elif case == "unpack":
        unpack(src, dst)
    else:
        params, _ = load_pretrained(src, dtype, mesh)
        arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "above": memory("VmHWM") - before - arrays}


def memory(line: str) -> int:
    """A line of this process's status in bytes: VmRSS (resident now) or VmHWM (peak resident)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(f"{line}:"))


if __name__ == "__main__":
    main()
