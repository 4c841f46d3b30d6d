"""`python -m efx_jax.evaluation PATH`: perplexity and task scores of a checkpoint, as Markdown tables."""

import argparse
import dataclasses
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efx_jax.config import Config, DataConfig
from efx_jax.config_io import load_config
from efx_jax.data.tasks import Task, held_out_sources, load_tasks, load_text
from efx_jax.data.tokenizer import Tokenizer, check_vocabulary
from efx_jax.data.tokens import Tokenized, text_windows
from efx_jax.errors import FallbackWarning, InputError, OneLineParser, exit_code, positive_number, whole_number
from efx_jax.evaluation.perplexity import Perplexity, perplexity
from efx_jax.evaluation.protocols import AnswerRecord, check_protocol, describe_task, evaluate_task
from efx_jax.evaluation.relative import (
    Records,
    Results,
    check_pairs,
    check_ratios,
    read_evaluation,
    relative,
    warn_of_another_dtype,
)
from efx_jax.evaluation.report import results_tables, write_evaluation
from efx_jax.files import refuse_unwritable
from efx_jax.lora import Adapters
from efx_jax.model.decoder import Params
from efx_jax.model.spec import ModelSpec, spec_from_config
from efx_jax.weights.bundle import Bundle, bundle_params, check_base, content_sha256, open_bundle
from efx_jax.weights.hf import load_pretrained, load_tokenizer, open_checkpoint
from efx_jax.weights.peft import load_adapter

_DTYPES = ("float32", "bfloat16", "float16")
_DATA_FLAGS = ("template", "context", "new_tokens", "format", "root", "max_length")
_MODEL_FLAGS = ("compute_dtype",)
_EVAL_FLAGS = ("window", "text_tokens")
# Settings of train.py that the data readers name in error messages, and that are flags of this command.
_SETTING = re.compile(
    r"(?<![\w/.-])(?:data\.(template|context|new_tokens|format|root|max_length|test|text)|eval\.(window))(?!\.?\w|/)"
)
_MOST_LENGTH = 2048  # unless the user sets a length; 512 is too short for a bill and its summary


@dataclasses.dataclass(frozen=True)
class _Work:
    """Everything to be measured, read and checked before the weights are loaded."""

    spec: ModelSpec
    adapters: Adapters | None
    tokenizer: Tokenizer
    config: Config
    windows: list[Tokenized]
    tasks: tuple[Task, ...]
    dense: tuple[Results, Records] | None
    bundles: tuple[Bundle, ...]


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 2 for bad input, reported in one line on stderr, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _run(arguments), "error", "interrupted; nothing is written")


def _run(arguments: argparse.Namespace) -> int:
    _fill_in(arguments)
    try:
        _evaluate(arguments, _prepare(arguments))
    except InputError as error:
        raise InputError(_SETTING.sub(_flag, str(error))) from error
    return 0


def _fill_in(arguments: argparse.Namespace) -> None:
    """The defaults of flags that belong to one protocol; under another one the flag is a mistake and is warned of."""
    for name, protocol, default in (("runs", "sampled", 4), ("normalize", "likelihood", "sum")):
        given = getattr(arguments, name)
        if given is not None and arguments.protocol != protocol:
            warnings.warn(f"--{name} has no effect without --protocol {protocol}", FallbackWarning, stacklevel=2)
        setattr(arguments, name, default if given is None else given)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m efx_jax.evaluation", description=__doc__)
    add = parser.add_argument
    add("path", help="Hugging Face folder, run folder, .gguf file, Hub name or quickstart")
    add("--adapter", default="", metavar="DIR", help="PEFT adapter that is measured on top of it")
    add(
        "--bundle",
        nargs="+",
        default=[],
        metavar="DIR",
        help="bundles of convert_weights.py bundle: each expert in turn on PATH, its base, which is read once",
    )
    add("--tasks", nargs="+", default=[], metavar="TASK", help="names, mixes, or files of prompt and response rows")
    add("--protocol", choices=("likelihood", "greedy", "sampled"), default="likelihood", help="how answers are got")
    add("--runs", type=positive_number, help="runs of the protocol sampled; default: 4")
    add("--rows", type=whole_number, default=0, help="test rows of every task, a fixed sample; 0: all")
    add("--text", default="", metavar="TEXT", help="perplexity text: a file of rows with text, or a name")
    add("--text-tokens", type=whole_number, help="tokens of text scored; 0: all; default: 20000")
    add("--window", type=whole_number, help="tokens per perplexity window; default: 512")
    add("--batch-size", type=positive_number, default=16, help="rows per forward pass")
    add("--template", help='such as "Question: {question}\\nAnswer: => {answer}"; \\n: a line break')
    add("--context", help="column of the template that is shortened where a row is too long")
    add(
        "--new-tokens",
        type=positive_number,
        help="tokens of an answer, where those of your own rows are free text, no labels",
    )
    add("--format", choices=("plain", "alpaca", "chat"), help="frame of the prompts; default: plain")
    add("--root", help="folder of the data files (or EFX_DATA)")
    add(
        "--max-length",
        type=positive_number,
        help="tokens per row; a longer one is shortened in its context; default: 2048, or the model's context if less",
    )
    add("--normalize", choices=("sum", "mean"), help="likelihood: over the tokens of an answer; default: sum")
    add("--seed", type=whole_number, default=0, help="of the protocol sampled")
    add("--dtype", choices=("keep", *_DTYPES), default="keep", help="of the weights; keep: their own")
    add("--compute-dtype", choices=_DTYPES, help="of the matmul operands; sums are float32; default: bfloat16")
    add("--relative-to", default="", metavar="DIR", help="the dense model's --output: also prints Rel.%% to it")
    add("--output", default="", metavar="DIR", help="writes summary.json, results.md and predictions.jsonl there")
    parser.epilog = (
        "A run folder's own template, context, new_tokens, format, root, max_length, window, text_tokens and "
        "compute_dtype hold unless given, and without --tasks and --text its tasks and its text. Without any: icd10."
    )
    return parser


def _flag(setting: re.Match[str]) -> str:
    name = setting[1] or setting[2]
    return "--tasks" if name == "test" else f"--{name.replace('_', '-')}"


def _prepare(arguments: argparse.Namespace) -> _Work:
    """Reads everything except the weights, and refuses what cannot be measured."""
    if arguments.bundle and arguments.adapter:
        raise InputError("--adapter: expected none beside --bundle, whose experts have adapters of their own; drop one")
    if arguments.output:
        for folder in _outputs(arguments):
            _check_output(folder, arguments.relative_to)
    dense = read_evaluation(Path(arguments.relative_to)) if arguments.relative_to else None
    source = open_checkpoint(arguments.path)
    spec = spec_from_config(source.config)
    adapters = load_adapter(arguments.adapter, spec) if arguments.adapter else None
    config = _settings(arguments, spec)
    names, text = _sources(arguments, config.data)
    tokenizer = load_tokenizer(arguments.path)
    check_vocabulary(tokenizer, spec.vocab_size)
    tasks = load_tasks(names, config.data, tokenizer, arguments.rows)
    for task in tasks:
        check_protocol(spec, tokenizer, task, arguments.protocol)
    if dense is not None:
        described = {
            task.name: describe_task(task, arguments.protocol, arguments.runs, arguments.normalize) for task in tasks
        }
        check_pairs(described, dense[0], Path(arguments.relative_to))
        warn_of_another_dtype(Path(arguments.relative_to), config.model.compute_dtype)
        check_ratios(*dense, Path(arguments.relative_to))
    windows = _windows(text, config, spec, tokenizer) if text else []
    bundles = tuple(open_bundle(folder) for folder in arguments.bundle)
    if bundles:
        digest = content_sha256(source, spec)
        for bundle in bundles:
            check_base(bundle, source, spec, digest)
    return _Work(spec, adapters, tokenizer, config, windows, tasks, dense, bundles)


def _outputs(arguments: argparse.Namespace) -> list[Path]:
    """Where the results go: one folder, or for bundles one subfolder each, named after the bundle."""
    if not arguments.bundle:
        return [Path(arguments.output)]
    names = [Path(folder).resolve().name for folder in arguments.bundle]
    if len(set(names)) < len(names):
        raise InputError(
            f"--bundle: expected folders of different names, found {' '.join(names)}; rename one, or leave --output out"
        )
    return [Path(arguments.output) / name for name in names]


def _check_output(folder: Path, dense: str) -> None:
    if (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: is a run, whose summary.json would be overwritten; choose another --output")
    if dense and folder.resolve() == Path(dense).resolve():
        raise InputError(f"{folder}: is what --relative-to compares with; choose another --output")
    refuse_unwritable(folder)


def _settings(arguments: argparse.Namespace, spec: ModelSpec) -> Config:
    """The sections model, data and eval: those of the run, or else the defaults, overridden by the flags."""
    if (arguments.max_length or 0) > spec.max_position_embeddings:
        raise InputError(
            f"--max-length: expected at most the model's context of {spec.max_position_embeddings} tokens, "
            f"found {arguments.max_length}; lower --max-length"
        )
    folder = Path(arguments.path).expanduser()
    if _is_run(folder):
        base = load_config(folder / "config.yaml")
    else:
        if folder.name == "export" and _is_run(folder.parent):
            print(
                f"warning: {arguments.path}: the data settings of its run do not hold for an export by itself; give "
                f"{folder.parent} to measure with them",
                file=sys.stderr,
            )
        length = min(spec.max_position_embeddings, _MOST_LENGTH)
        base = Config(data=DataConfig(max_length=length))
    data = dataclasses.replace(base.data, **_given(arguments, _DATA_FLAGS))
    measured = dataclasses.replace(base.eval, **_given(arguments, _EVAL_FLAGS))
    model = dataclasses.replace(base.model, **_given(arguments, _MODEL_FLAGS))
    return dataclasses.replace(base, model=model, data=data, eval=measured)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "export").is_dir()


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    values = vars(arguments)
    return {name: values[name] for name in names if values[name] is not None}


def _sources(arguments: argparse.Namespace, data: DataConfig) -> tuple[Sequence[str], str]:
    """Tasks and perplexity text: those given, else the run's, else icd10's."""
    joined = next((name for name in arguments.tasks if "," in name and not Path(name).exists()), None)
    if joined is not None:
        raise InputError(f"--tasks {joined}: expected names separated by blanks; write {joined.replace(',', ' ')}")
    idle = next((name for name in _EVAL_FLAGS if getattr(arguments, name) is not None and not arguments.text), None)
    if arguments.tasks and idle is not None:
        flag = idle.replace("_", "-")
        raise InputError(f"--{flag}: --tasks alone measures no perplexity; give --text, or leave it out")
    if arguments.tasks or arguments.text:
        return arguments.tasks, arguments.text
    if Path(data.train).suffix in (".yaml", ".yml") and not Path(data.train).expanduser().is_file():
        raise InputError(
            f"{data.train}: the mix of the run {arguments.path} is not here; evaluate it from the folder that it was "
            "trained from, or give --tasks or --text"
        )
    names, text = held_out_sources(data)
    if not names and not text:
        raise InputError(f"{arguments.path}: a run without tasks or text of its own; give --tasks or --text")
    return names, text


def _windows(text: str, config: Config, spec: ModelSpec, tokenizer: Tokenizer) -> list[Tokenized]:
    window = config.eval.window
    if window > spec.max_position_embeddings:
        raise InputError(
            f"--window: expected at most the model's context of {spec.max_position_embeddings} tokens, "
            f"found {window}; lower --window"
        )
    return text_windows(load_text(text, config.data), tokenizer, window, config.eval.text_tokens)


def _evaluate(arguments: argparse.Namespace, work: _Work) -> None:
    dtype = None if arguments.dtype == "keep" else arguments.dtype
    outputs = _outputs(arguments) if arguments.output else [None] * max(1, len(work.bundles))
    if not work.bundles:
        _measure(load_pretrained(arguments.path, dtype)[0], work, arguments, outputs[0])
        return
    base, _ = load_pretrained(arguments.path, None)
    for bundle, output in zip(work.bundles, outputs, strict=True):
        print(f"## {bundle.folder}\n")
        params = bundle_params(bundle, base, work.spec, dtype)
        _measure(params, work, argparse.Namespace(**vars(arguments) | {"bundle": str(bundle.folder)}), output)
        print()


def _measure(params: Params, work: _Work, arguments: argparse.Namespace, output: Path | None) -> None:
    """Measures one model, writes the results if there is a place, and prints their tables."""
    text = _measure_text(params, work, arguments)
    results: dict[str, dict[str, Any]] = {}
    records: list[AnswerRecord] = []
    seconds = {}
    for task in work.tasks:
        print(f"{task.name}: {len(task.test)} rows ...", file=sys.stderr)
        start = time.perf_counter()
        results[task.name], own = _measure_task(params, work, task, arguments)
        records += own
        seconds[task.name] = time.perf_counter() - start
        print(f"  done in {seconds[task.name]:.0f} s", file=sys.stderr)
    compared = None
    if work.dense is not None:
        compared = {"to": arguments.relative_to} | relative(results, records, *work.dense)
    if output is not None:
        config = work.config
        sections = ((config.model, _MODEL_FLAGS), (config.data, _DATA_FLAGS), (config.eval, _EVAL_FLAGS))
        settled = {name: getattr(section, name) for section, names in sections for name in names}
        asked = vars(arguments) | settled
        write_evaluation(output, asked, text, results, compared, seconds, records)
    print(results_tables(text, results, compared))


def _measure_text(params: Params, work: _Work, arguments: argparse.Namespace) -> Perplexity | None:
    if not work.windows:
        return None
    print("perplexity ...", file=sys.stderr)
    return perplexity(
        params,
        work.windows,
        work.spec,
        work.adapters,
        batch_size=arguments.batch_size,
        compute_dtype=work.config.model.compute_dtype,
    )


def _measure_task(
    params: Params, work: _Work, task: Task, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[AnswerRecord]]:
    return evaluate_task(
        params,
        work.spec,
        work.tokenizer,
        task,
        arguments.protocol,
        work.adapters,
        batch_size=arguments.batch_size,
        compute_dtype=work.config.model.compute_dtype,
        runs=arguments.runs,
        seed=arguments.seed,
        normalize=arguments.normalize,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
