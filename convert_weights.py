#!/usr/bin/env python3
"""Converts, describes and compares checkpoints.

    python convert_weights.py import SRC DST [--dtype D]    Hugging Face folder or GGUF file -> Orbax folder
    python convert_weights.py export SRC DST [--dtype D]    Orbax or run folder -> Hugging Face folder
        [--max-shard-size 2GB]
    python convert_weights.py export SRC FILE.gguf --format gguf [--dtype D]    ... -> GGUF file for llama.cpp
    python convert_weights.py adapter RUN DST [--dtype D]   adapters of a run -> PEFT folder
    python convert_weights.py pack SRC DST                  dense Hugging Face folder -> packed folder, lossless
    python convert_weights.py unpack SRC DST                packed folder -> the dense folder that it was
    python convert_weights.py bundle RUN DST                what a run has made of its base, without the base
    python convert_weights.py apply BASE BUNDLE DST         the run's export from the base and a bundle, bit for bit
    python convert_weights.py inspect PATH                  shapes, dtypes, sparsity, patterns, sizes
    python convert_weights.py verify A B                    configuration and every tensor; exit code 1 if they differ

A mistake in the input is one line on stderr and exit code 2.
"""

import argparse
import sys
from pathlib import Path

from efx_jax.errors import InputError, OneLineParser, byte_size, exit_code


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = OneLineParser("convert_weights.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    read = commands.add_parser("import", help="Hugging Face folder or GGUF file -> Orbax folder")
    write = commands.add_parser("export", help="Orbax or run folder -> Hugging Face folder or GGUF file")
    adapter = commands.add_parser("adapter", help="adapters of a run -> PEFT folder")
    for command, default in (
        (read, "every tensor keeps its own"),
        (write, "every tensor keeps its own; of gguf float16"),
        (adapter, "float32"),
    ):
        command.add_argument("src", metavar="SRC")
        command.add_argument("dst", metavar="DST", help="folder (or file) to make; must not exist")
        command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=f"default: {default}")
    write.add_argument(
        "--format",
        choices=("hf", "gguf"),
        default="hf",
        help="hf: config.json, safetensors, tokenizer; gguf: one file for llama.cpp",
    )
    write.add_argument(
        "--max-shard-size",
        type=byte_size,
        metavar="SIZE",
        help="of hf: size from which the weights are split into several files, such as 500MB; default: 5GB",
    )
    for name, words in (("pack", "dense folder -> packed folder"), ("unpack", "packed folder -> dense folder")):
        command = commands.add_parser(name, help=words)
        command.add_argument("src", metavar="SRC")
        command.add_argument("dst", metavar="DST", help="folder to make; must not exist")
    make = commands.add_parser("bundle", help="what a run has made of its base, without the base")
    make.add_argument("run", metavar="RUN", help="folder of a finished run")
    make.add_argument("dst", metavar="DST", help="folder to make; must not exist")
    rebuild = commands.add_parser("apply", help="base and bundle -> the run's export, bit for bit")
    rebuild.add_argument("base", metavar="BASE", help="the model that the run started from")
    rebuild.add_argument("bundle", metavar="BUNDLE")
    rebuild.add_argument("dst", metavar="DST", help="folder to make; must not exist")
    commands.add_parser("inspect", help="describe a checkpoint").add_argument("path", metavar="PATH")
    compare = commands.add_parser("verify", help="compare two checkpoints; exit code 1 if they differ")
    compare.add_argument("a", metavar="A")
    compare.add_argument("b", metavar="B")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = parser().parse_args(arguments)
    return exit_code(lambda: run(options), "convert_weights.py")


def run(options: argparse.Namespace) -> int:
    """Runs the parsed command; the imports are here so that --help answers at once."""
    if options.command == "import":
        from efx_jax.weights.convert import import_checkpoint

        import_checkpoint(options.src, options.dst, options.dtype)
        print(f"wrote {options.dst}")
        return 0
    if options.command == "export":
        export(options)
        print(f"wrote {options.dst}")
        return 0
    if options.command == "adapter":
        from efx_jax.training.adapter import export_adapter

        print(export_adapter(options.src, options.dst, options.dtype or "float32"))
        return 0
    if options.command == "pack":
        from efx_jax.weights.packed import pack

        print(pack(options.src, options.dst).text(options.dst))
        return 0
    if options.command == "unpack":
        from efx_jax.weights.packed import unpack

        unpack(options.src, options.dst)
        print(f"wrote {options.dst}")
        return 0
    if options.command == "bundle":
        from efx_jax.analysis.outcome import run_outcome
        from efx_jax.weights.bundle_write import sizes_text, write_bundle

        print(f"wrote {options.dst}\n{sizes_text(write_bundle(run_outcome(Path(options.run)), options.dst))}")
        return 0
    if options.command == "apply":
        from efx_jax.weights.bundle import apply_bundle

        apply_bundle(options.base, options.bundle, options.dst)
        print(f"wrote {options.dst}")
        return 0
    from efx_jax.weights.inspect import inspect, verify

    if options.command == "inspect":
        print(inspect(options.path))
        return 0
    report, code = verify(options.a, options.b)
    print(report)
    return code


def export(options: argparse.Namespace) -> None:
    """Writes a checkpoint in the requested format."""
    from efx_jax.weights.convert import export_checkpoint

    if options.format == "gguf":
        from efx_jax.weights.gguf_export import export_gguf

        if options.max_shard_size:
            raise InputError("--max-shard-size: a GGUF file is one file; leave it out, or choose --format hf")
        export_gguf(options.src, options.dst, options.dtype or "float16")
        return
    export_checkpoint(options.src, options.dst, options.dtype, options.max_shard_size)


if __name__ == "__main__":
    sys.exit(main())
