"""Eight simulated devices on the CPU, and a tiny checkpoint with its tokenizer, for every test that wants one."""

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from efx_jax.model.spec import init_params
from efx_jax.weights.hf import save_pretrained
from tests.tiny import LLAMA, WORDS, save_tokenizer

jax.config.update("jax_num_cpu_devices", 8)
# On a busy machine one of eight simulated devices may be late by more than the 40 s after which XLA ends the process.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=300"
# XLA starts a thread for each of them, and collectives block those: whatever else a program does in parallel may then
# find none, and all devices wait for ever. Seen in one of three runs of test_sharded_event.py on two busy cores.
os.environ.setdefault("PJRT_NPROC", "32")
# Two thirds of the tests' time goes into compiling, and much of that is what another worker, or a process that a test
# starts, has compiled too. The workers of pytest-xdist come here with the variable set, so the folder is one for all.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="efx_jax_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
MAPPINGS = Path("/proc/self/maps")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--first-cases`: what the second Python of .ci/run needs, as versions differ by function and not by case."""
    parser.addoption("--first-cases", action="store_true", help="of a parametrized test run the first case alone")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out every case but the first of a test; `trylast`: of those that no mark leaves out."""
    if not config.getoption("--first-cases"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    config.hook.pytest_deselected(items=[item for item in items if item is not first[item.nodeid.partition("[")[0]]])
    items[:] = first.values()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Every compiled program maps some memory, and a process that has 65,530 mappings (Linux) dies in the compiler."""
    yield
    if not MAPPINGS.exists() or MAPPINGS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: LLaMA, D 16, F 24, H 4, L 2, four query heads on two key/value heads, context 64."""
    spec = dataclasses.replace(LLAMA, vocab_size=len(WORDS.split()) + 3)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_pretrained(folder, init_params(jax.random.key(0), spec), spec)
    save_tokenizer(folder)
    return folder
