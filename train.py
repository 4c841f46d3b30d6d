"""Trains a sparse domain expert: flags and YAML in, `efx_jax.training.run` to work. `python train.py --help`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from efx_jax.config import Config
from efx_jax.config_io import resolve
from efx_jax.errors import INTERRUPTED, exit_code


@dataclasses.dataclass(frozen=True)
class _Flags:
    """Turns a language model into a sparse domain expert while it is fine-tuned with LoRA."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: str = "configs/quickstart.yaml"
    """YAML file of settings, over the preset; flags override both."""
    preset: Literal["paper", "official", "efx", "none"] = "efx"
    """Preset below the file's settings, in place of the one that the file names ("none": no preset). Given without a
    file, no file is read."""
    output: str = "runs/<name of the config>"
    """Folder that the run writes into; repeating the same command resumes."""
    dry_run: bool = False
    """Print the settings, the sizes and the memory estimate; train nothing."""


def main(argv: Sequence[str]) -> int:
    """Runs one training; returns the exit code: 2 for a user error, reported in one line, 130 after Ctrl-C."""
    return exit_code(lambda: _train(argv), "train.py")


def _train(argv: Sequence[str]) -> int:
    resolved = resolve([argument for argument in argv if argument not in ("-h", "--help")])
    if "-h" in argv or "--help" in argv:
        _print_help(resolved.config)
        return 0
    # Imported here so that a mistyped flag is reported without waiting for jax.
    from efx_jax.training.run import run

    summary = run(resolved.config, resolved.output, resolved.dry_run)
    return 0 if summary or resolved.dry_run else INTERRUPTED


def _print_help(config: Config) -> None:
    """Prints every flag with its meaning and current value, by tyro, which then ends the process."""
    tyro.cli(
        _Flags,
        prog="train.py",
        args=["--help"],
        default=_Flags(settings=config),
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
