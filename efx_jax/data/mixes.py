"""Mixes of tasks: a few lines of YAML that say which tasks are learned together, and how many rows of each."""

import contextlib
import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from efx_jax.config_io import config_folder, read_yaml
from efx_jax.config_values import nearest, parse_value
from efx_jax.data.catalogue import OFFICIAL
from efx_jax.errors import InputError

_SEED = 1234  # the paper's
_MOST_ROWS = 10**8


@dataclasses.dataclass(frozen=True)
class Part:
    """One task of a mix: one of the paper's, or the user's own files."""

    name: str
    rows: int = 0
    """Training rows drawn, in equal shares per label; 0 takes every row once."""
    labels: tuple[tuple[str, int], ...] = ()
    """Training rows drawn for each label, instead of `rows`."""
    split: str = "train"
    """Split to learn from, for one of the paper's tasks."""
    upsample: bool = True
    """Whether rows are repeated if a label has fewer than are to be drawn."""
    train: str = ""
    """File of training rows, looked for beside the mix first, or a Hub name."""
    test: str = ""
    """File of test rows, likewise."""
    template: str = ""
    """Prompt template of the files, like `data.template`."""
    context: str = ""
    """Column that may be shortened, like `data.context`."""
    new_tokens: int = 0
    """Maximum tokens of a generated answer if the answers are free text; 0: they are labels."""


@dataclasses.dataclass(frozen=True)
class Mix:
    """Tasks that are learned and scored together."""

    name: str
    parts: tuple[Part, ...]
    text: str = ""
    """Perplexity text, like `data.text`."""
    seed: int = _SEED
    """Chooses the rows, whatever the seed of the run."""


def find_mix(name: str) -> Mix | None:
    """The mix that a name stands for: a .yaml file, a shipped mix ("health"), or a single task of the paper.

    Returns:
        The mix, or None where the name is none of these.

    Raises:
        InputError: the file is not a valid mix.
    """
    if name in OFFICIAL:
        return Mix(name, (Part(name),))
    if Path(name).suffix in (".yaml", ".yml"):
        return read_mix(Path(name))
    return read_mix(_shipped() / f"{name}.yaml") if name in mix_names() else None


@contextlib.contextmanager
def naming(mix: Mix, part: Part) -> Iterator[None]:
    """Prefixes errors about the task's rows with the names of the mix and the task."""
    try:
        yield
    except InputError as error:
        if mix.name == part.name:  # a task of the paper by itself
            raise
        message = re.sub(r"\bdata\.(template|context|new_tokens)\b", rf"tasks.{part.name}.\1", str(error))
        raise type(error)(f"{mix.name}: tasks.{part.name}: {message}") from error


def mix_names() -> list[str]:
    """The names of the shipped mixes."""
    return sorted(path.stem for path in _shipped().glob("*.yaml"))


def read_mix(path: Path) -> Mix:
    """Reads a mix; names of files in the mix's folder become paths that include the folder.

    Args:
        path: YAML with `tasks` (name -> fields of `Part`), and optionally `text` and `seed`.

    Raises:
        InputError: an unreadable file, an unknown key (with the closest known one), a wrong value, or a task without
            rows.
    """
    tree = read_yaml(path.expanduser())
    _known(tree, ("tasks", "text", "seed"), str(path))
    tasks = tree.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise InputError(f"{path}: expected `tasks:` with a task or more below it, found {str(tasks)[:40]!r}")
    seed = _value(tree.get("seed", str(_SEED)), int, f"{path}: seed")
    if seed < 0:
        raise InputError(f"{path}: seed must be at least 0, found {seed}")
    parts = [_part(name, fields, f"{path}: tasks.{name}") for name, fields in tasks.items()]
    folder = path.expanduser().parent
    return Mix(
        path.stem,
        tuple(
            dataclasses.replace(part, train=_beside(folder, part.train), test=_beside(folder, part.test))
            for part in parts
        ),
        _beside(folder, _value(tree.get("text", ""), str, f"{path}: text")),
        seed,
    )


def _beside(folder: Path, source: str) -> str:
    """The file of that name in the folder of the mix if there is one, else the name unchanged."""
    return str(folder / source) if source and (folder / source).is_file() else source


def _part(name: str, fields: Any, where: str) -> Part:
    if fields == "":
        fields = {}
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected fields such as `rows: 1000`, found {str(fields)[:40]!r}")
    kinds = {key: kind for key, kind in typing.get_type_hints(Part).items() if key != "name"}
    _known(fields, kinds, where)
    values = {key: _value(fields[key], kinds[key], f"{where}.{key}") for key in fields if key != "labels"}
    part = Part(name, **values, labels=_quotas(fields.get("labels", {}), f"{where}.labels"))
    own = bool(part.train or part.test)
    if not own and name not in OFFICIAL:
        raise InputError(
            f"{where}: no task of that name; the nearest is {nearest(name, OFFICIAL)}; for rows of your own give "
            "train: and test: files"
        )
    if not own and part.split not in OFFICIAL[name].splits:
        raise InputError(f"{where}.split: expected one of {', '.join(OFFICIAL[name].splits)}, found {part.split!r}")
    if (own and part.split != "train") or (not own and (part.template or part.context or part.new_tokens)):
        raise InputError(
            f"{where}: split belongs to the paper's tasks; template, context and new_tokens to rows of your own, which "
            "train: and test: name; leave out what does not belong"
        )
    if part.rows and part.labels:
        raise InputError(f"{where}: expected either rows or labels, found both; labels alone say how many rows")
    if not 0 <= part.rows <= _MOST_ROWS or part.new_tokens < 0:
        raise InputError(
            f"{where}: expected rows in [0, {_MOST_ROWS:,}] and new_tokens of at least 0, found {part.rows} and "
            f"{part.new_tokens}"
        )
    return part


def _quotas(labels: Any, where: str) -> tuple[tuple[str, int], ...]:
    if not isinstance(labels, dict):
        raise InputError(f"{where}: expected a number of rows per label, found {str(labels)[:40]!r}")
    quotas = tuple((label, _value(rows, int, f"{where}.{label}")) for label, rows in labels.items())
    if not all(1 <= rows <= _MOST_ROWS for _, rows in quotas):
        raise InputError(f"{where}: expected 1 to {_MOST_ROWS:,} rows per label, found {dict(quotas)}")
    return quotas


def _value(node: Any, kind: Any, where: str) -> Any:
    if not isinstance(node, str):
        raise InputError(f"{where}: expected one value, found {str(node)[:40]!r}")
    return parse_value(where, [node], kind)


def _known(tree: dict[str, Any], names: Iterable[str], where: str) -> None:
    names = list(names)
    unknown = next((key for key in tree if key not in names), None)
    if unknown is not None:
        raise InputError(f"{where}: {unknown} is no key of a mix; the nearest is {nearest(unknown, names)}")


def _shipped() -> Path:
    return config_folder() / "mixes"
