"""What each of two processes does for `test_two_hosts.py`: `two_hosts.py COORDINATOR PROCESS FOLDER`.

Prints one JSON object: what it read, wrote and held, and the errors that it met.
"""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from safetensors.numpy import load_file

from efx_jax.config import MeshConfig
from efx_jax.errors import InputError
from efx_jax.files import atomic_folder
from efx_jax.parallel.hosts import meet, start_hosts
from efx_jax.parallel.mesh import make_mesh
from efx_jax.weights.hf import load_pretrained, save_pretrained

SHAPES = ((1, 2, 2), (2, 1, 2), (1, 4, 1), (1, 1, 4))


def main() -> None:
    coordinator, process, root = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    start_hosts(MeshConfig(coordinator=coordinator, processes=2, process=process))
    results: dict[str, Any] = {"processes": jax.process_count(), "devices": jax.device_count()}
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        results[name] = load_and_save(make_mesh(MeshConfig(*shape)), root / "model", root / name)
    mesh = make_mesh(MeshConfig(fsdp=4))
    results["nan"] = error_of(lambda: load_pretrained(root / "nan", dtype=None, mesh=mesh))
    params, spec = load_pretrained(root / "model", dtype=None, mesh=mesh)
    results["exists"] = error_of(lambda: save_pretrained(root / "model", params, spec))
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with mock.patch("os.pwrite", full if process == 1 else os.pwrite):
        results["full"] = error_of(lambda: save_pretrained(root / "full", params, spec))
    results["bug"] = error_of(lambda: fail_in_process_0(root / "bug"))
    print(json.dumps(results))


def load_and_save(mesh: jax.sharding.Mesh, src: Path, dst: Path) -> dict[str, int]:
    """Loads and saves once to warm up, then counts the bytes that go through this process's files."""
    params, spec = load_pretrained(src, dtype=None, mesh=mesh)
    save_pretrained(dst.with_suffix(".first"), params, spec, source=src)
    read = moved("rchar", lambda: load_pretrained(src, dtype=None, mesh=mesh))
    with jax.set_mesh(mesh):
        written = moved("wchar", lambda: save_pretrained(dst, params, spec, source=src))
    check_values(params, load_file(src / "model.safetensors"))
    held = owned = 0
    for leaf in jax.tree.leaves(params):
        distinct = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        held += sum(distinct.values())
        owned += sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.replica_id == 0)
    return {"read": read, "held": held, "written": written, "owned": owned}


def moved(counter: str, action: Callable[[], object]) -> int:
    """Bytes that the action moves by system calls on files."""
    before = counted(counter)
    action()
    return counted(counter) - before


def counted(counter: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[counter])


def check_values(params: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    down = np.stack([tensors[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in range(2)])
    expected = {"embed_tokens": tensors["model.embed_tokens.weight"], "down_proj": down}
    for name, array in (("embed_tokens", params["embed_tokens"]), ("down_proj", params["layers"]["down_proj"])):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[name][shard.index])


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (InputError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def fail_in_process_0(path: Path) -> None:
    with atomic_folder(path, shared=True) as partial:
        if jax.process_index() == 0:
            raise ValueError("a bug")
        (partial / "file").touch()
        meet()


if __name__ == "__main__":
    main()
