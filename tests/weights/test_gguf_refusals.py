"""A GGUF file that is damaged, or that another program would run otherwise, is refused with one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.weights.gguf import open_gguf
from tests.weights.gguf_files import F, H, gguf_tensors, hf_tensors, metadata_for, refusal, tiny_model, write_gguf


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.attn_factor", 1.2),
        ("rope.dimension_count", H // 2),
        ("attention.value_length", 2 * H),
        ("attention.sliding_window", 64),
        ("expert_count", 8),
        ("logit_scale", 0.5),
        ("feed_forward_length", [F, 2 * F]),
    ],
)
def test_option_that_changes_the_model_is_refused_by_name(tmp_path: Path, option: str, value: Any) -> None:
    assert option in refusal(tiny_model(tmp_path / "m.gguf", **{option: value}))


@pytest.mark.parametrize("value", [0, "two"])
def test_size_that_is_not_a_positive_number_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    assert "block_count" in refusal(tiny_model(tmp_path / "m.gguf", block_count=value))


def test_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "gemma2", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    assert "'gemma2'" in refusal(path)


def test_unsupported_quantisation_is_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors["blk.0.ffn_up.weight"] = np.zeros((F, 66), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata_for("llama"), tensors, {"blk.0.ffn_up.weight": "IQ2_XXS"})
    message = refusal(path)
    assert "IQ2_XXS" in message and "blk.0.ffn_up.weight" in message


@pytest.mark.parametrize("number", [0, 1])
def test_a_file_of_several_is_refused_as_one(tmp_path: Path, number: int) -> None:
    """The first has the metadata and some of the tensors, the others have tensors alone."""
    split = {"split.no": number, "split.count": 2, "split.tensors.count": 30}
    metadata = metadata_for("llama") | split if number == 0 else split
    tensors = {"token_embd.weight": np.zeros((4, 4), np.float32)}
    path = write_gguf(tmp_path / f"m-0000{number + 1}-of-00002.gguf", "llama", metadata, tensors)
    assert "is one of the 2 files of a split GGUF" in refusal(path) and "llama-gguf-split --merge" in refusal(path)


def test_missing_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors("qwen3", hf_tensors("qwen3"))
    del tensors["blk.1.attn_k_norm.weight"]
    path = write_gguf(tmp_path / "missing.gguf", "qwen3", metadata_for("qwen3"), tensors)
    assert "'blk.1.attn_k_norm.weight' is missing" in refusal(path)
    tensors = gguf_tensors("llama", hf_tensors("llama")) | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    path = write_gguf(tmp_path / "unknown.gguf", "llama", metadata_for("llama"), tensors)
    assert "'blk.0.attn_sinks.weight'" in refusal(path)


def test_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert "no such file" in refusal(path)
    for content in (b"", b"GG", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        assert "not a GGUF file" in refusal(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big"))
    assert "version" in refusal(path)


def test_truncated_file_is_refused_with_one_line(tmp_path: Path) -> None:
    whole = tiny_model(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(4, 3000, 7), len(whole) - 33, len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert "truncated" in refusal(path)


def test_damaged_header_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    whole = np.frombuffer(tiny_model(tmp_path / "m.gguf").read_bytes(), np.uint8)
    path = tmp_path / "damaged.gguf"
    rng = np.random.default_rng(3)
    messages = []
    for _ in range(500):
        damaged = whole.copy()
        damaged[rng.integers(4, 3000)] = rng.integers(0, 256)
        path.write_bytes(damaged.tobytes())
        try:
            open_gguf(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)
