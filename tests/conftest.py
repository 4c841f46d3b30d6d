"""Eight simulated devices on the CPU, and a tiny checkpoint with its tokenizer, for every test that wants one."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from efx_jax.model.spec import init_params
from efx_jax.weights.hf import save_pretrained
from tests.tiny import LLAMA, WORDS, save_tokenizer

jax.config.update("jax_num_cpu_devices", 8)
MAPPINGS = Path("/proc/self/maps")


def pytest_configure(config: pytest.Config) -> None:
    """Compiling is most of the time here: modules and child processes share their programs through pytest's cache."""
    cache = getattr(config, "cache", None)
    if cache is None:  # -p no:cacheprovider
        return
    settings = {
        "jax_compilation_cache_dir": str(cache.mkdir("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


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
