"""`python -m efx_jax.analysis.report RUN ...`: report.html of a finished run, a page that loads nothing."""

import argparse
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from efx_jax.analysis import report_curves, report_parts
from efx_jax.analysis.html import Html, element, join, page, paragraph, text
from efx_jax.analysis.record import RunRecord, read_record
from efx_jax.analysis.wording import expert_name, is_trained, pattern
from efx_jax.errors import OneLineParser, exit_code
from efx_jax.files import atomic_write

NAME = "report.html"
_CONTENTS = (
    ("results", "Results"),
    ("asked", "What was asked"),
    ("training", "Training"),
    ("zeros", "Zeros"),
    ("resources", "Time and memory"),
    ("samples", "Sample answers"),
    ("loading", "Load it"),
    ("origin", "How it was made"),
    ("limits", "Limits"),
)


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 2 for bad input, reported in one line on stderr."""
    parser = OneLineParser(prog="python -m efx_jax.analysis.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py has finished")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _run(arguments), "error")


def _run(arguments: argparse.Namespace) -> int:
    for folder in map(Path, arguments.runs):
        print(write_report(folder))
    return 0


def write_report(folder: Path) -> Path:
    """Writes report.html into the folder of a finished run, from the files it has left there; needs no model.

    Returns:
        The file.

    Raises:
        InputError: not a finished run, a damaged file, or a folder that is not writable.
    """
    path = folder / NAME
    atomic_write(path, report_page(read_record(folder)))
    return path


def report_page(record: RunRecord) -> Html:
    """The whole page."""
    title = expert_name(record.config)
    links = (element("li", element("a", text(words), {"href": f"#{name}"})) for name, words in _CONTENTS)
    done = "LoRA fine-tuning" if is_trained(record.summary) else "no training"
    head = [
        element("h1", text(title)),
        report_parts.headline(record),
        paragraph(f"A run of efx_jax: {done}, {pattern(record.config)}.", "soft"),
    ]
    parts = [
        element("header", join(head, "\n")),
        element("nav", element("ul", join(links)), {"aria-label": "Contents"}),
        report_parts.results(record),
        report_parts.asked(record),
        report_curves.curves(record),
        report_curves.zeros(record),
        report_parts.resources(record),
        report_parts.samples(record),
        report_parts.loading(record),
        report_parts.origin(record),
        report_parts.limits(record),
    ]
    return page(title, _style(), parts)


def _style() -> str:
    return resources.files("efx_jax.analysis").joinpath("report.css").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
