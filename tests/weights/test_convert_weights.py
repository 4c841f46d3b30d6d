import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from convert_weights import main
from efx_jax.weights.byte_ranges import Part
from efx_jax.weights.hf import load_tokenizer
from efx_jax.weights.inspect import Difference, _difference
from efx_jax.weights.source import TensorSource

ROOT = Path(__file__).parents[2]


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _assert_refused(capsys: pytest.CaptureFixture[str], src: Path, *words: str) -> None:
    """`import` ends with code 2 and one line that holds the words, and leaves nothing beside the source."""
    before = sorted(os.listdir(src.parent))
    code, out, err = _run(capsys, "import", src, src.parent / "dst")
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word in err
    assert sorted(os.listdir(src.parent)) == before


def test_import_export_and_verify(capsys: pytest.CaptureFixture[str], make_folder: Callable, tmp_path: Path) -> None:
    src = make_folder(shards=2)
    assert _run(capsys, "import", src, tmp_path / "orbax")[0] == 0
    assert _run(capsys, "export", tmp_path / "orbax", tmp_path / "out", "--format", "hf")[0] == 0
    code, out, _ = _run(capsys, "verify", src, tmp_path / "out")
    assert (code, out) == (0, "all 30 tensors are identical\n")
    assert _run(capsys, "export", tmp_path / "orbax", tmp_path / "half", "--dtype", "float16")[0] == 0
    code, out, _ = _run(capsys, "verify", src, tmp_path / "half")
    assert code == 1
    assert "largest absolute difference" in out


def test_shards_are_as_small_as_asked_for(capsys: pytest.CaptureFixture[str], make_folder: Callable) -> None:
    src = make_folder()
    out = src.parent / "out"
    assert _run(capsys, "export", src, out, "--max-shard-size", "6kB")[0] == 0
    sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(sizes) == len(set(index["weight_map"].values())) > 2
    # Beside its tensors a file has a header.
    assert max(sizes) < 6000 + 3000
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as shard:
            tensors = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118
        assert sum(tensors) <= 6000 or len(tensors) == 1
    assert _run(capsys, "verify", src, out)[:2] == (0, "all 30 tensors are identical\n")


def test_a_head_that_tied_embeddings_would_replace_is_never_left_out(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, make_tensors: Callable, tmp_path: Path
) -> None:
    """transformers does not tie where both are there: without its head it would be another model."""
    tensors = make_tensors(tied=True)
    head = tensors["model.embed_tokens.weight"]
    src, other = (
        make_folder(name, tied=True, tensors={**tensors, "lm_head.weight": factor * head})
        for name, factor in (("src", 2), ("other", 3))
    )
    pytest.importorskip("gguf")
    asked: tuple[tuple[object, ...], ...] = (
        ("export", src, tmp_path / "out"),
        ("export", src, tmp_path / "out.gguf", "--format", "gguf"),
        ("pack", src, tmp_path / "packed"),
        ("inspect", src),
        ("verify", src, other),
    )
    for arguments in asked:
        code, _, err = _run(capsys, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "ties the embeddings, but lm_head.weight differs from model.embed_tokens.weight" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "src"]


def test_models_of_equal_tensors_and_other_configs_are_not_the_same(
    capsys: pytest.CaptureFixture[str], make_folder: Callable
) -> None:
    one, other = make_folder("one"), make_folder("other", config={"rope_theta": 5e5})
    code, out, _ = _run(capsys, "verify", one, other)
    assert code == 1
    assert out.startswith("config: rope ") and out.endswith("all 30 tensors are identical\n")


def test_tensors_are_compared_a_block_of_rows_at_a_time(tmp_path: Path) -> None:
    a = np.ones((5_000, 1_000), np.float32)
    b = a.copy()
    a[0, 0], b[0, 0] = 1000, 1001
    b[-1, 3] = 3
    read = []

    def source(values: np.ndarray) -> TensorSource:
        def read_part(name: str, part: Part) -> np.ndarray:
            read.append(values[part].nbytes)
            return values[part]

        return TensorSource(tmp_path, {}, {"w": values.shape}, {"w": "float32"}, read_part)

    assert _difference(source(a), source(a), "w") is None
    assert _difference(source(a), source(b), "w") == Difference(2.0, 2 / 3)
    assert sum(read) == 4 * a.nbytes and max(read) <= 1 << 23
    b[2_000] = np.nan
    assert math.isnan(_difference(source(a), source(b), "w").absolute)


def test_a_checkpoint_with_a_nan_is_itself(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, make_tensors: Callable
) -> None:
    tensors = make_tensors()
    tensors["model.norm.weight"][3] = np.nan
    src = make_folder(tensors=tensors)
    assert _run(capsys, "verify", src, src)[:2] == (0, "all 30 tensors are identical\n")
    assert _run(capsys, "verify", src, make_folder("sound"))[0] == 1


def test_an_export_claims_no_pattern_of_its_base_and_no_code(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, tmp_path: Path
) -> None:
    claims = {
        "sparsity_config": {"sparsity_structure": "2:4"},
        "compression_config": {},
        "auto_map": {"AutoModel": "x"},
    }
    src = make_folder(config={**claims, "pad_token_id": 3})
    assert _run(capsys, "export", src, tmp_path / "out")[0] == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["pad_token_id"] == 3
    assert not claims.keys() & written.keys()


def _write_gguf(path: Path, vocabulary: dict[str, Any]) -> Path:
    """A qwen2 model of one layer with a tokenizer; its matrices are float16."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "qwen2")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
    for key, value in {**sizes, "attention.head_count": 2}.items():
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    for key, value in vocabulary.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(vocabulary["tokenizer.ggml.tokens"]), 32)}
    shapes |= {f"blk.0.attn_{name}.weight": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate.weight": (64, 32), "blk.0.ffn_up.weight": (64, 32), "blk.0.ffn_down.weight": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float16))
    vectors = [f"blk.0.attn_{name}.bias" for name in "qkv"] + ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"]
    for name in [*vectors, "output_norm.weight"]:
        writer.add_tensor(name, rng.standard_normal(32).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_a_folder_with_the_same_tensors_and_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    golden = json.loads((ROOT / "tests" / "golden" / "gguf_tokenizers.json").read_text(encoding="utf-8"))
    src = _write_gguf(tmp_path / "model.gguf", golden["qwen2"]["metadata"])
    assert _run(capsys, "import", src, tmp_path / "orbax")[0] == 0
    assert _run(capsys, "export", tmp_path / "orbax", tmp_path / "out")[0] == 0
    assert _run(capsys, "verify", src, tmp_path / "out")[:2] == (0, "all 14 tensors are identical\n")
    text = "Three patients, 12 mg each."
    ids = [load_tokenizer(path)(text).input_ids for path in (src, tmp_path / "orbax", tmp_path / "out")]
    assert ids[0] == ids[1] == ids[2]


def test_run_folder_is_exported(capsys: pytest.CaptureFixture[str], make_folder: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    make_folder().rename(tmp_path / "run" / "export")
    assert _run(capsys, "export", tmp_path / "run", tmp_path / "out")[0] == 0
    assert _run(capsys, "verify", tmp_path / "run", tmp_path / "out")[0] == 0


def test_inspect_prints_a_line_per_kind_of_tensor(capsys: pytest.CaptureFixture[str], make_folder: Callable) -> None:
    code, out, _ = _run(capsys, "inspect", make_folder(model_type="qwen3"))
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()[10:]]
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    norms = ["input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"]
    assert sorted(names) == sorted(["tensor", "embed_tokens", *linears, *norms, "norm", "lm_head"])


def test_truncated_file_is_refused_with_one_line(capsys: pytest.CaptureFixture[str], make_folder: Callable) -> None:
    src = make_folder()
    file = src / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    _assert_refused(capsys, src, "model.safetensors", "cannot be read as safetensors", "download")


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, b"<html>not found</html>", (8).to_bytes(8, "little") + b"garbage!"]
)
def test_garbage_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, content: bytes
) -> None:
    src = make_folder()
    (src / "model.safetensors").write_bytes(content)
    _assert_refused(capsys, src, "model.safetensors", "cannot be read as safetensors")


def test_missing_shard_is_refused_with_one_line(capsys: pytest.CaptureFixture[str], make_folder: Callable) -> None:
    src = make_folder(shards=3)
    (src / "model-00002-of-00003.safetensors").unlink()
    _assert_refused(capsys, src, "model-00002-of-00003.safetensors", "missing")


def test_shard_without_its_tensor_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str], make_folder: Callable
) -> None:
    src = make_folder(shards=2)
    (src / "model-00001-of-00002.safetensors").write_bytes((src / "model-00002-of-00002.safetensors").read_bytes())
    _assert_refused(capsys, src, "model-00001-of-00002.safetensors", "model.embed_tokens.weight is missing")


def test_wrong_shape_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, make_tensors: Callable
) -> None:
    tensors = make_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((16, 24), np.float32)
    src = make_folder(tensors=tensors)
    _assert_refused(capsys, src, "model.layers.1.mlp.up_proj.weight", "[16, 24]", "[24, 16]")


def test_missing_tensor_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, make_tensors: Callable
) -> None:
    tensors = make_tensors()
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    _assert_refused(capsys, make_folder(tensors=tensors), "model.layers.2.self_attn.o_proj.weight", "missing")


@pytest.mark.parametrize("name", ["model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
def test_extra_tensor_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, make_tensors: Callable, name: str
) -> None:
    src = make_folder(tensors={**make_tensors(), name: np.ones(16, np.float32)})
    _assert_refused(capsys, src, f"tensor {name} is unknown", "llama")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weight_that_is_no_number_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, make_tensors: Callable, value: float, dtype: str
) -> None:
    tensors = make_tensors(dtype=dtype)
    tensors["model.layers.1.self_attn.k_proj.weight"][7, 3] = value
    src = make_folder(tensors=tensors)
    _assert_refused(capsys, src, "model.layers.1.self_attn.k_proj.weight", f"holds {value} at [7, 3]")
    code, _, err = _run(capsys, "export", src, src.parent / "dst")
    assert (code, err.count("\n")) == (2, 1) and "k_proj.weight holds numbers that are not finite" in err, err


def test_weight_beyond_a_dtype_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, make_tensors: Callable
) -> None:
    tensors = make_tensors(dtype="float32")
    tensors["model.norm.weight"][2] = np.finfo(np.float32).max
    src = make_folder(tensors=tensors)
    code, _, err = _run(capsys, "export", src, src.parent / "dst", "--dtype", "bfloat16")
    assert (code, err.count("\n")) == (2, 1) and "model.norm.weight holds numbers that are not finite in" in err, err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mixtral"}, ("model_type 'mixtral'", "llama, qwen2, qwen3")),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ("rope_type 'longrope'", "yarn")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config",)),
        ({"hidden_size": None}, ("hidden_size",)),
    ],
)
def test_unsupported_config_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, config: dict, words: tuple[str, ...]
) -> None:
    _assert_refused(capsys, make_folder(config=config), *words)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff"])
def test_garbled_config_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, content: str
) -> None:
    src = make_folder()
    (src / "config.json").write_text(content, encoding="latin-1")
    _assert_refused(capsys, src, "config.json")


def test_existing_destination_is_refused(
    capsys: pytest.CaptureFixture[str], make_folder: Callable, tmp_path: Path
) -> None:
    src, dst = make_folder("a"), make_folder("b")
    before = json.loads((dst / "config.json").read_text())
    code, _, err = _run(capsys, "import", src, dst)
    assert code == 2
    assert "exists already" in err and err.count("\n") == 1
    assert json.loads((dst / "config.json").read_text()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "a", "b", "--dtpye", "float32"),
        ("import", "a", "b", "--dtype", "int8"),
        ("export", "a", "b", "--format", "onnx"),
        ("export", "a", "b", "--format", "gguf"),
        ("export", "a", "b", "--max-shard-size", "large"),
        ("export", "a", "b", "--max-shard-size", "0GB"),
        ("adapter", "a", "b"),
        ("import", "a"),
        ("pack", "a", "b"),
        (),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, out, err = _run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1


def test_script_reports_a_missing_path_and_help() -> None:
    script = [sys.executable, "convert_weights.py"]
    missing = subprocess.run(
        [*script, "inspect", "./no/such/folder"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1 and "no/such/folder" in missing.stderr
    helped = subprocess.run([*script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert helped.returncode == 0
    assert "verify" in helped.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
def test_a_reader_that_has_enough_ends_the_command_without_a_word(make_folder: Callable) -> None:
    src = make_folder()
    script = f"'{sys.executable}' convert_weights.py inspect '{src}' | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")  # 0: it was done before the reader was gone
