"""`python -m efx_jax.compare.train_one CONFIG OUTPUT [TRUNK]`: one run of a comparison, from its resolved settings."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from efx_jax.config_io import read_config
from efx_jax.errors import INTERRUPTED, FallbackWarning, InputError, exit_code
from efx_jax.training.run import run


def main(argv: Sequence[str]) -> int:
    """Trains or resumes; returns the exit code: 2 (and a one-line error) on bad input or a full disk, 130 on Ctrl-C."""
    return exit_code(lambda: _train(*map(Path, argv)), "error")


def _train(config: Path, output: Path, trunk: Path | None = None) -> int:
    with warnings.catch_warnings():
        # The tables state the requested settings, so a fallback to others must be an error.
        warnings.simplefilter("error", FallbackWarning)
        try:
            summary = run(read_config(config), output, trunk=trunk)
        except FallbackWarning as fallback:
            raise InputError(f"a comparison takes nothing else than its file says: {fallback}") from fallback
    return 0 if summary else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
