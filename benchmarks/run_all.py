"""Every speed benchmark, one after the other, on the device at hand: the one command for a bare GPU machine.

    python benchmarks/run_all.py [--small] [--only train_step ...] [--out docs/results]

It needs this package's core dependencies and, to compare with peft, torch, transformers and peft. Rows are printed as
they are measured and kept in `OUT/<script>.json`. A script that fails or takes too long gets a line that says so, and
the next one starts; the exit code is then 1. `--small` does the same on a CPU in a minute or two.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
TINY = str(FOLDER / "tiny")


@dataclasses.dataclass(frozen=True)
class Script:
    """One benchmark: its arguments on a GPU and on a CPU, and the minutes that it may take."""

    name: str
    full: tuple[str, ...]
    small: tuple[str, ...]
    minutes: float


# The longest last, so that the others have their rows early.
SCRIPTS = (
    Script("selection", (), ("--shapes", "96x64", "64x96", "--repeats", "2"), 10),
    Script(
        "attention",
        (),
        ("--models", "smollm2_135m", "--batch", "1", "--length", "128", "--repeats", "2", "--dtype", "float32"),
        20,
    ),
    Script(
        "prune_event",
        (),
        ("--models", TINY, "--rows", "4", "--length", "32", "--calibration-tokens", "64", "--repeats", "1"),
        60,
    ),
    Script(
        "train_step",
        (),
        ("--models", TINY, "--batch", "2", "--length", "32", "--remat", "linears", "--repeats", "2", "--together"),
        180,
    ),
)


def main() -> None:
    arguments = parse()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    # So that `run` ends the processes it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failures = 0
    for script in SCRIPTS:
        if script.name not in arguments.only:
            continue
        began = time.monotonic()
        flags = (*(script.small if arguments.small else script.full), "--out", str(out / f"{script.name}.json"))
        print(json.dumps({"script": script.name, "flags": flags}), flush=True)
        minutes = arguments.minutes or script.minutes
        ended = run(script.name, flags, 60 * minutes)
        failures += ended != "done"
        print(
            json.dumps({"script": script.name, "ended": ended, "seconds": round(time.monotonic() - began, 1)}),
            flush=True,
        )
    sys.exit(1 if failures else 0)


def run(name: str, flags: tuple[str, ...], seconds: float) -> str:
    """Runs a script, its output passed straight through; ends it and all its processes when its time is up."""
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *flags]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
        return "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds / 60:g} minutes"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its session, including the processes it started
            process.wait()


def parse() -> argparse.Namespace:
    names = [script.name for script in SCRIPTS]
    parser = argparse.ArgumentParser(description="Every speed benchmark on the device at hand.")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=0, help="time limit of every script; 0: its own")
    parser.add_argument("--out", default="docs/results", help="folder of the rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
