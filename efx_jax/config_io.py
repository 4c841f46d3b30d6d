"""Fills a `Config`: a preset, then a YAML file, then flags, each overriding the one before."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from efx_jax.config import Config
from efx_jax.config_effects import warn_of_idle_flags
from efx_jax.config_rules import validate
from efx_jax.config_values import describe, nearest, parse_value, replace_values, setting_types
from efx_jax.errors import FallbackWarning, InputError

PRESETS = ("paper", "official", "efx")
# Replaces a preset's name when the file names one that is not wanted.
NO_PRESET = "none"
_CONTROLS = {"config": str, "preset": str, "output": str, "dry_run": bool}
_HELP = "`python train.py --help` lists them all"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A resolved command line: the settings, the folder that the run writes into, and whether to only plan the run."""

    config: Config
    output: Path
    dry_run: bool


def resolve(argv: Sequence[str]) -> Resolved:
    """Reads `[--config FILE] [--preset NAME] [--output DIR] [--dry-run] [--section.field VALUE ...]`.

    Flags override the file and the file overrides the preset. With neither file nor preset the file is
    `configs/quickstart.yaml`. Both `--a.b=c` and `--a.b c` are read, hyphens count as underscores, and if a flag is
    given twice, the last one applies.

    Args:
        argv: the arguments after the script's name.

    Returns:
        The checked settings; the output folder is `runs/<name of the file or preset>` unless given.

    Raises:
        InputError: an unknown flag or key, a wrong type, an empty name, an unreadable file, or a value out of range.
    """
    kinds = setting_types() | _CONTROLS
    values = {name: parse_value(f"--{name}", texts, kinds[name]) for name, texts in _read_flags(argv).items()}
    for name in ("config", "preset", "output"):
        # For example from an unset shell variable.
        if values.get(name) == "":
            raise InputError(f"--{name} must not be empty; name one, or leave --{name} out")
    path, preset = values.pop("config", None), values.pop("preset", None)
    output, dry_run = values.pop("output", None), values.pop("dry_run", False)
    if path is None and preset is None:
        path = config_folder() / "quickstart.yaml"
        if "data.train" in values:
            warnings.warn(
                f"--data.train {values['data.train']} without --config: all that is not on the "
                "command line (steps, rate, length, --output) is the quickstart's, made for its few short rows; for "
                "rows of your own begin with --config configs/own_data.yaml",
                FallbackWarning,
                stacklevel=2,
            )
    config = replace_values(load_config(path, preset), values)
    validate(config)
    warn_of_idle_flags(config, values)
    name = Path(path).stem if path else preset
    return Resolved(config=config, output=Path(f"runs/{name}" if output is None else output), dry_run=dry_run)


def load_config(path: str | Path | None = None, preset: str | None = None) -> Config:
    """The settings of a YAML file over those of a preset over the defaults, not yet checked by `validate`.

    Args:
        path: YAML file of sections with fields; its key `preset` names the preset below it.
        preset: replaces the file's own choice; "none" leaves every preset out.

    Raises:
        InputError: an unknown preset or key, a wrong type, or an unreadable file.
    """
    tree = read_yaml(Path(path)) if path else {}
    own_preset = tree.pop("preset", "")
    preset = preset or own_preset
    base = replace_values(Config(), preset_settings(preset)) if preset not in ("", NO_PRESET) else Config()
    return replace_values(base, parse_settings(tree, str(path)))


def preset_settings(preset: str) -> dict[str, Any]:
    """What a preset sets, by dotted path.

    Raises:
        InputError: an unknown preset.
    """
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r} is not known; expected one of {', '.join(PRESETS)}, or none")
    path = config_folder() / "presets" / f"{preset}.yaml"
    return parse_settings(read_yaml(path), str(path))


def from_yaml(text: str, source: str = "config.yaml") -> Config:
    """Reads the YAML that `to_yaml` writes, or any part of it; missing settings take their defaults.

    Args:
        text: sections of fields.
        source: name of the text in error messages.

    Raises:
        InputError: broken YAML, an unknown key or a wrong type.
    """
    return replace_values(Config(), parse_settings(_parse_yaml(text, source), source))


def read_config(path: Path) -> Config:
    """The settings of a run, from a file that holds `to_yaml`'s text.

    Raises:
        InputError: as `from_yaml`, or a file that cannot be read.
    """
    return replace_values(Config(), parse_settings(read_yaml(path), str(path)))


def to_yaml(config: Config) -> str:
    """Every setting, resolved. `from_yaml(to_yaml(config)) == config`."""
    # YAML has lists but no tuples.
    tree = {
        name: {field: list(value) if isinstance(value, tuple) else value for field, value in section.items()}
        if isinstance(section, dict)
        else section
        for name, section in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(tree, sort_keys=False, width=120)


def read_yaml(path: Path) -> dict[str, Any]:
    """The tree of a YAML file, whose leaves are texts or lists.

    Raises:
        InputError: an unreadable file, broken YAML, or no mapping at the top level.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}; name a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"config file {path} is not UTF-8 text; name a YAML file") from None
    return _parse_yaml(text, str(path))


def config_folder() -> Path:
    """The folder `configs`: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _read_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """The texts of every flag, by the name of its setting or control."""
    kinds = setting_types() | _CONTROLS
    flags: dict[str, list[str]] = {}
    name = ""
    for token in argv:
        if token.startswith("--"):
            written, equals, text = token[2:].partition("=")
            name, implied = _named_setting(written.replace("-", "_"), kinds)
            flags[name] = [text] if equals else implied
        elif not name:
            raise InputError(f"{token!r} does not follow a flag; expected --section.field VALUE; {_HELP}")
        else:
            flags[name].append(token)
    for name, texts in flags.items():
        if not texts and kinds[name] is bool:
            texts.append("true")
        elif not texts:
            raise InputError(f"--{name} lacks its value; expected {describe(kinds[name])}")
    return flags


def _named_setting(name: str, kinds: dict[str, Any]) -> tuple[str, list[str]]:
    """The setting that a flag names, and the text that the name implies: `--log.no-wandb` implies "false"."""
    if name in kinds:
        return name, []
    section, dot, field = name.rpartition(".")
    positive = section + dot + field.removeprefix("no_")
    if positive != name and kinds.get(positive) is bool:
        return positive, ["false"]
    raise InputError(f"--{name} is not a setting; the nearest is --{nearest(name, kinds)}; {_HELP}")


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    """A tree whose leaves are texts or lists: `config_values` knows the types, YAML does not."""
    try:
        _refuse_repeated(yaml.compose(text, Loader=yaml.BaseLoader), source)
        tree = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{source}:{line}: broken YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: broken YAML: {' '.join(str(error).split())}") from None
    if tree in (None, ""):
        return {}
    if not isinstance(tree, dict):
        raise InputError(
            f"{source}: expected sections such as `prune:` with fields below them, found {str(tree)[:40]!r}"
        )
    return tree


def _refuse_repeated(root: Any, source: str) -> None:
    """Refuses a key that occurs twice in one mapping; YAML would silently take the last."""
    pending: list[Any] = [root]
    met: set[int] = set()
    while pending:
        node = pending.pop()
        if not isinstance(node, yaml.MappingNode) or id(node) in met:
            continue
        met.add(id(node))  # an alias may lead back to it
        seen: set[str] = set()
        for key, value in node.value:
            pending.append(value)
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                line = key.start_mark.line + 1
                raise InputError(f"{source}:{line}: {key.value} is given twice; expected it once; remove or rename one")
            seen.add(key.value)


def parse_settings(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Some settings' values by dotted path, for `replace_values`.

    Args:
        tree: sections of fields whose leaves are texts or lists, as `read_yaml` gives them.
        source: name of the tree in error messages.

    Raises:
        InputError: an unknown key or a wrong type.
    """
    kinds = setting_types()
    values: dict[str, Any] = {}
    for name, node in tree.items():
        for key, texts in _flatten(name, node, source).items():
            if key not in kinds:
                raise InputError(f"{source}: {key} is not a setting; the nearest is {nearest(key, kinds)}; {_HELP}")
            texts = texts if isinstance(texts, list) else [texts]
            if not all(isinstance(text, str) for text in texts):
                raise InputError(f"{source}: {key} must be {describe(kinds[key])}, found {texts}")
            values[key] = parse_value(f"{source}: {key}", texts, kinds[key])
    return values


def _flatten(name: str, node: Any, source: str) -> dict[str, Any]:
    """The fields below one top-level key, by dotted path."""
    if not any(key.startswith(f"{name}.") for key in setting_types()):
        return {name: node}
    if node == "":
        return {}
    if not isinstance(node, dict):
        raise InputError(f"{source}: {name} must hold fields below it, found {node!r}")
    return {f"{name}.{field}": texts for field, texts in node.items()}
