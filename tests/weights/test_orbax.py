import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.weights.convert import export_checkpoint, import_checkpoint
from efx_jax.weights.hf import load_pretrained, save_pretrained
from efx_jax.weights.inspect import inspect, verify


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_import_and_export_give_back_the_same_bytes(
    model_type: str,
    tied: bool,
    dtype: str,
    make_folder: Callable,
    read_folder: Callable,
    assert_same_bytes: Callable,
    tmp_path: Path,
) -> None:
    src = make_folder(model_type=model_type, tied=tied, dtype=dtype, shards=2)
    import_checkpoint(src, tmp_path / "orbax")
    export_checkpoint(tmp_path / "orbax", tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), read_folder(src))


def test_tensors_of_different_dtype_keep_their_own(
    make_folder: Callable, make_tensors: Callable, read_folder: Callable, assert_same_bytes: Callable, tmp_path: Path
) -> None:
    tensors = make_tensors(dtype="bfloat16")
    for name, dtype in (("layers.1.self_attn.q_proj", np.float32), ("layers.2.input_layernorm", np.float16)):
        tensors[f"model.{name}.weight"] = tensors[f"model.{name}.weight"].astype(np.float32).astype(dtype)
    src = make_folder(tensors=tensors)
    import_checkpoint(src, tmp_path / "orbax")
    export_checkpoint(tmp_path / "orbax", tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors)


def test_orbax_folder_loads_like_its_origin(make_folder: Callable, tmp_path: Path) -> None:
    src = make_folder(model_type="qwen3", dtype="bfloat16")
    import_checkpoint(src, tmp_path / "orbax")
    for dtype in (None, "float32"):
        (expected, spec), (found, found_spec) = load_pretrained(src, dtype), load_pretrained(tmp_path / "orbax", dtype)
        assert found_spec == spec
        assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, expected)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_dtype_is_converted_on_import_and_on_export(
    make_folder: Callable, make_tensors: Callable, read_folder: Callable, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    expected = make_tensors(dtype="bfloat16")[name]
    import_checkpoint(make_folder(), tmp_path / "orbax", dtype="bfloat16")
    export_checkpoint(tmp_path / "orbax", tmp_path / "narrow")
    export_checkpoint(tmp_path / "orbax", tmp_path / "wide", dtype="float32")
    narrow, wide = read_folder(tmp_path / "narrow"), read_folder(tmp_path / "wide")
    np.testing.assert_array_equal(narrow[name], expected)
    np.testing.assert_array_equal(wide[name], expected.astype(np.float32))
    assert {str(tensor.dtype) for tensor in narrow.values()} == {"bfloat16"}
    assert {str(tensor.dtype) for tensor in wide.values()} == {"float32"}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_small_files_travel_through_orbax(make_folder: Callable, tmp_path: Path) -> None:
    src = make_folder()
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (src / name).write_text(name)
    import_checkpoint(src, tmp_path / "orbax")
    export_checkpoint(tmp_path / "orbax", tmp_path / "out")
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["a_key_of_its_own"] == {"kept": True}


def test_orbax_folder_can_be_the_source_of_an_export(make_folder: Callable, tmp_path: Path) -> None:
    import_checkpoint(make_folder(), tmp_path / "orbax")
    params, spec = load_pretrained(tmp_path / "orbax")
    save_pretrained(tmp_path / "out", params, spec, source=tmp_path / "orbax")
    assert verify(tmp_path / "out", tmp_path / "orbax")[1] == 0


def test_cut_or_missing_file_is_one_line(make_folder: Callable, tmp_path: Path) -> None:
    import_checkpoint(make_folder(), tmp_path / "orbax")
    files = [path for path in (tmp_path / "orbax" / "params").rglob("*") if path.is_file()]
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        os.truncate(file, len(content) - 1)
        expected = f"{re.escape(str(file))}: has {len(content) - 1} bytes, expected {len(content)}"
        with pytest.raises(InputError, match=expected):
            load_pretrained(tmp_path / "orbax")
        file.unlink()
        with pytest.raises(InputError, match=f"{re.escape(str(file))}: has 0 bytes"):
            load_pretrained(tmp_path / "orbax")
        file.write_bytes(content)
    load_pretrained(tmp_path / "orbax")


def test_garbled_orbax_file_is_one_line(make_folder: Callable, tmp_path: Path) -> None:
    import_checkpoint(make_folder(), tmp_path / "orbax")
    file = tmp_path / "orbax" / "params" / "_METADATA"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(InputError, match="cannot be read as an Orbax checkpoint") as caught:
        load_pretrained(tmp_path / "orbax")
    assert "\n" not in str(caught.value)


def test_too_small_disk_is_refused_before_any_tensor_is_read(
    make_folder: Callable, make_tensors: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(tensor.nbytes for tensor in make_tensors().values())
    src = make_folder()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    monkeypatch.setattr("efx_jax.weights.hf.read_part", lambda *_: pytest.fail("a tensor was read"))
    for convert in (import_checkpoint, export_checkpoint):
        with pytest.raises(InputError, match=f"needs {size:,} bytes, but the disk has {size - 1:,} free"):
            convert(src, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["hf"]


def test_garbled_tensor_of_an_orbax_folder_is_one_line(make_folder: Callable, tmp_path: Path) -> None:
    import_checkpoint(make_folder(), tmp_path / "orbax")
    largest = max((tmp_path / "orbax" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    size = largest.stat().st_size
    # The arrays come first, the table of them last.
    largest.write_bytes(bytes(size // 2) + largest.read_bytes()[size // 2 :])
    with pytest.raises(InputError, match="cannot be read as an Orbax checkpoint") as caught:
        load_pretrained(tmp_path / "orbax")
    assert "\n" not in str(caught.value)


def test_orbax_folder_of_another_config_is_refused(make_folder: Callable, tmp_path: Path) -> None:
    import_checkpoint(make_folder(), tmp_path / "orbax")
    config = json.loads((tmp_path / "orbax" / "config.json").read_text())
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(InputError, match=r"layers.gate_proj has shape \[3, 24, 16\], expected \[3, 32, 16\]"):
        load_pretrained(tmp_path / "orbax")


def test_failed_import_leaves_nothing(make_folder: Callable, make_tensors: Callable, tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["lm_head.weight"][39, 15] = np.inf
    src = make_folder(tensors=tensors)
    with pytest.raises(InputError, match=r"lm_head.weight holds inf at \[39, 15\]"):
        import_checkpoint(src, tmp_path / "orbax")
    assert os.listdir(tmp_path) == ["hf"]


def test_inspect_counts_parameters_and_exact_zeros(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors(model_type="qwen2", tied=True, dtype="bfloat16")
    for layer in range(3):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][:12] = 0
    text = inspect(make_folder(model_type="qwen2", tied=True, tensors=tensors))
    assert f"parameters  {sum(tensor.size for tensor in tensors.values()):,}" in text
    assert "qwen2, 3 layers, tied head" in text
    assert "dtype       bfloat16\n" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["up_proj"] == ["up_proj", "3", "24", "x", "16", "bfloat16", "1,152", "50.0000%", "unstructured"]
    assert rows["q_proj_bias"] == ["q_proj_bias", "3", "32", "bfloat16", "96", "0.0000%"]
    # 12 of 24 rows of 16 in one of the seven matrices.
    linear = 32 * 16 + 2 * 16 * 16 + 16 * 32 + 3 * 24 * 16
    assert rows["sparsity"][1] == f"{12 * 16 / linear:.4%}"


def test_inspect_counts_what_is_not_finite(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors(dtype="bfloat16")
    assert "not finite" not in inspect(make_folder("whole", tensors=tensors))
    tensors["model.layers.1.mlp.up_proj.weight"][3, :2] = np.inf, -np.inf
    tensors["lm_head.weight"][39, 15] = np.nan
    assert "not finite  3 entries are NaN or infinite\n" in inspect(make_folder("broken", tensors=tensors))


def test_verify_measures_the_largest_difference(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors()
    a = make_folder("a", tensors=tensors)
    assert verify(a, a) == ("all 30 tensors are identical", 0)
    tensors["model.norm.weight"][:2] = 4.0, 0.5
    b = make_folder("b", tensors=tensors)
    tensors["model.norm.weight"][:2] = 3.5, 0.25
    c = make_folder("c", tensors=tensors)
    report, code = verify(b, c)
    assert code == 1
    assert report.splitlines() == [
        "model.norm.weight: absolute 0.5, relative 0.5",
        "1 of 30 tensors differ: largest absolute difference 0.5, largest relative difference 0.5",
    ]


def test_verify_sees_equal_numbers_in_another_dtype(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors(dtype="bfloat16")
    a = make_folder("a", dtype="bfloat16", tensors=tensors)
    b = make_folder("b", tensors={name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    assert verify(a, b) == ("all 30 tensors are identical in value; their dtypes differ", 0)


def test_verify_sees_another_config_and_another_shape(make_folder: Callable) -> None:
    a = make_folder("a")
    report, code = verify(a, make_folder("b", config={"rms_norm_eps": 1e-6}))
    assert code == 1
    assert report.splitlines()[0] == "config: rms_norm_eps 1e-05 against 1e-06"
    report, code = verify(a, make_folder("c", model_type="qwen3"))
    assert code == 1
    assert report.splitlines()[0] == "different models"
