"""Sums in a fixed order on GPUs, requested from XLA by its environment variable."""

import os
import warnings

import jax

_FLAG = "--xla_gpu_deterministic_ops"


def ask_for_determinism() -> None:
    """Adds the flag to XLA_FLAGS, unless it is already set there: the environment takes precedence.

    Call it before anything touches a device: XLA reads the variable then. If a GPU has been touched, a warning says
    that it is too late for the flag; CPUs do not need it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG in flags:
        return
    if _has_started() and jax.default_backend() != "cpu":
        warnings.warn(
            f"train.deterministic: jax has already started; set XLA_FLAGS={_FLAG}=true before it does", stacklevel=2
        )
        return
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=true".strip()


def _has_started() -> bool:
    """Whether jax has initialized its devices: from then on it refuses to change their number."""
    before = jax.config.values["jax_num_cpu_devices"]
    try:
        jax.config.update("jax_num_cpu_devices", before + 1)
        jax.config.update("jax_num_cpu_devices", before)
    except RuntimeError:
        return True
    return False
