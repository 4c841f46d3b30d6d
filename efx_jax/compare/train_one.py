"""`python -m efx_jax.compare.train_one CONFIG OUTPUT`: one run of a comparison, from its resolved settings."""

import sys
from collections.abc import Sequence
from pathlib import Path

from efx_jax.config_io import from_yaml
from efx_jax.errors import InputError
from efx_jax.training.run import run

_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Trains or goes on; returns the exit code: 2 for bad input, told in one line, 130 after Ctrl-C."""
    config, output = map(Path, argv)
    try:
        summary = run(from_yaml(config.read_text(), str(config)), output)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0 if summary else _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
