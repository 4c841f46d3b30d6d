"""What makes tests quick and changes nothing that they look at."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import pytest

import efx_jax.training.loop as loop_module


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Within it XLA leaves out what would only make the tiny programs faster."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def shared_steps() -> Iterator[None]:
    """Within it runs with equal settings share the compiled step, whose static arguments hold the optimizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "optimizer", functools.lru_cache(loop_module.optimizer))
        yield
