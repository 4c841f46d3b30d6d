"""Two real processes of two devices each, on one disk."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efx_jax.model.spec import init_params
from efx_jax.weights.hf import load_pretrained, save_pretrained
from tests.tiny import EVEN

SPEC = dataclasses.replace(
    EVEN, vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=16, tie_word_embeddings=False
)
SHAPES = ("1x2x2", "2x1x2", "1x4x1", "1x1x4")
# Headers, configurations and what Python itself reads meanwhile.
SMALL_FILES = 60_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    save_pretrained(root / "model", init_params(jax.random.key(0), SPEC), SPEC)
    save_pretrained(root / "nan", load_pretrained(root / "model")[0], SPEC)
    tensors = load_file(root / "nan" / "model.safetensors")
    tensors["lm_head.weight"][511, 3] = np.nan
    save_file(tensors, root / "nan" / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> list[dict[str, Any]]:
    """What each process printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, str(Path(__file__).with_name("two_hosts.py")), coordinator]
    processes = [
        subprocess.Popen([*command, str(number), str(root)], env=environment, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(lines.splitlines()[-1]) for lines in printed]


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_there_are_two_processes_of_two_devices(results: list[dict[str, Any]]) -> None:
    assert [(one["processes"], one["devices"]) for one in results] == [(2, 4), (2, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_export_of_two_processes_is_that_of_one(shape: str, results: list[dict[str, Any]], root: Path) -> None:
    assert _bytes_of(root / shape) == _bytes_of(root / "model")


@pytest.mark.parametrize("shape", SHAPES)
def test_each_process_reads_what_its_devices_hold(shape: str, results: list[dict[str, Any]]) -> None:
    for one in results:
        assert 0 <= one[shape]["read"] - one[shape]["held"] < SMALL_FILES
    total = (results[0][shape]["held"], results[1][shape]["held"])
    assert total[0] == total[1]
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(init_params(jax.random.key(0), SPEC)))
    assert total[0] < (1.01 if shape == "2x1x2" else 0.51) * everything


@pytest.mark.parametrize("shape", SHAPES)
def test_each_process_writes_what_it_owns(shape: str, results: list[dict[str, Any]]) -> None:
    for one in results:
        assert 0 <= one[shape]["written"] - one[shape]["owned"] < SMALL_FILES
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(init_params(jax.random.key(0), SPEC)))
    assert sum(one[shape]["owned"] for one in results) == everything


def test_error_in_one_process_stops_the_other_too(results: list[dict[str, Any]]) -> None:
    assert "lm_head.weight holds nan at [511, 3]" in results[1]["nan"]
    assert results[0]["nan"].startswith("OtherProcessError: process 1 has failed")


def test_existing_folder_is_refused_by_both(results: list[dict[str, Any]]) -> None:
    assert "exists already" in results[0]["exists"]
    assert results[1]["exists"].startswith("OtherProcessError: process 0 has failed")


def test_full_disk_of_one_process_leaves_nothing(results: list[dict[str, Any]], root: Path) -> None:
    assert "the disk is full" in results[1]["full"]
    assert results[0]["full"].startswith("OtherProcessError: process 1 has failed")
    assert results[0]["bug"] == "ValueError: a bug"
    assert results[1]["bug"].startswith("OtherProcessError: process 0 has failed")
    expected = {"model", "nan", *SHAPES, *(f"{shape}.first" for shape in SHAPES)}
    assert set(os.listdir(root)) == expected
