"""A benchmark case in its own process, so that memory left on a device, or a crash, affects no other case."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Case = Mapping[str, Any]


def run_case(script: str, case: Case, seconds: float) -> dict[str, Any]:
    """What `answer` in `script`, a file beside this one, finds for `case`; `error` says why there is no result."""
    # Imported here: a rival's process imports this file too, and needs no jax.
    from efx_jax.training.devices import memory_settings

    command = [sys.executable, str(Path(__file__).with_name(script)), "--case", json.dumps(case)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=seconds, env=os.environ | memory_settings(os.environ)
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {seconds:g} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": f"its process ended with code {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def answer(measure: Callable[[Any], dict[str, Any]], case: str) -> None:
    """The child side of `run_case`: prints what `measure` finds for the case, or the error it ends in."""
    try:
        found = measure(json.loads(case))
    except Exception as error:  # out of memory, or a library that refuses: the other cases go on
        found = {"error": reason(error)}
    print(json.dumps(found), flush=True)


def reason(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


def failed(name: str, unit: str, error: str, **details: Any) -> dict[str, Any]:
    """Prints the row of a case that gave no figure."""
    found = {"name": name, "value": None, "unit": unit, "error": error, **details}
    print(json.dumps(found), flush=True)
    return found


def out_of_memory(found: Mapping[str, Any]) -> bool:
    """Whether a case ran out of memory; exit code -9 means that the kernel killed it."""
    error = str(found.get("error", "")).lower()
    return any(sign in error for sign in ("resource_exhausted", "out of memory", "outofmemory", "code -9"))
