"""Packed folders: the dense folder comes back as it was, opens as it did, and shows every damage."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import efx_jax
from efx_jax.config import MeshConfig
from efx_jax.errors import InputError
from efx_jax.model.spec import init_params
from efx_jax.parallel.mesh import make_mesh
from efx_jax.weights.convert import export_checkpoint
from efx_jax.weights.hf import load_pretrained, load_tokenizer, open_checkpoint, save_pretrained
from efx_jax.weights.inspect import inspect, verify
from efx_jax.weights.packed import pack, unpack
from efx_jax.weights.sealed import read_sealed, write_sealed
from tests.tiny import EVEN, LLAMA

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# No width is a multiple of eight.
ODD = dataclasses.replace(LLAMA, hidden_size=18, intermediate_size=23, num_heads=3, num_kv_heads=1, vocab_size=37)


def sparse_params(spec: Any = ODD, dtype: str = "float32", share: float = 0.5) -> dict[str, Any]:
    """Random parameters, a share of the linears' entries 0 and some of them -0.0."""
    rng = np.random.default_rng(0)

    def thin(path: Any, leaf: jax.Array) -> np.ndarray:
        values = np.array(leaf).astype(DTYPES[dtype])
        if path[-1].key.endswith("_proj"):
            values[rng.random(values.shape) < share] = 0
            values[:, 0, 0] = -0.0
        return values

    return jax.tree_util.tree_map_with_path(thin, init_params(jax.random.key(0), spec))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "dense", sparse_params(), ODD)
    return tmp_path / "dense"


@pytest.fixture
def packed(dense: Path, tmp_path: Path) -> Path:
    pack(dense, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_unpacked_folder_is_the_same_file_by_file(dtype: str, max_shard_bytes: int, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    save_pretrained(dense, sparse_params(dtype=dtype), ODD, max_shard_bytes=max_shard_bytes)
    assert len(list(dense.glob("*.safetensors"))) == 1 or max_shard_bytes == 3000
    (dense / "notes").mkdir()
    (dense / "notes" / "NOTICE.txt").write_bytes(b"\xff\r\n")
    (dense / "tokenizer.json").write_text('{"model": {}}')
    found = pack(dense, tmp_path / "packed")
    assert found.left_out == ()
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(dense)


def test_headers_of_other_writers_come_back_too(make_folder: Callable, make_tensors: Callable, tmp_path: Path) -> None:
    """The safetensors library orders tensors otherwise, and metadata may say anything; a norm is float32."""
    tensors = make_tensors("qwen3", dtype="bfloat16")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[tensor < 0] = 0
    dense = make_folder("hf", "qwen3", dtype="bfloat16", tensors=tensors, shards=2)
    file = dense / "model-00001-of-00002.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]) | {"__metadata__": {"format": "pt", "ä": '"\n'}}, indent=3)
    file.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + data[8 + length :])
    pack(dense, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(dense)


def test_arrays_are_those_of_the_layout(packed: Path, dense: Path) -> None:
    tensors, arrays = load_file(dense / "model.safetensors"), load_file(packed / "model.bitmask")
    stem = "model.layers.1.mlp.down_proj"
    weight = tensors[f"{stem}.weight"]
    stays = weight.view(np.uint32) != 0
    assert f"{stem}.weight" not in arrays and weight.shape[1] % 8
    np.testing.assert_array_equal(arrays[f"{stem}.shape"], np.array(weight.shape, np.int64))
    np.testing.assert_array_equal(arrays[f"{stem}.compressed"].view(np.uint32), weight.view(np.uint32)[stays])
    np.testing.assert_array_equal(arrays[f"{stem}.bitmask"], np.packbits(stays, axis=-1, bitorder="little"))
    counts = stays.sum(axis=1)
    np.testing.assert_array_equal(arrays[f"{stem}.row_offsets"], np.cumsum(counts) - counts)
    assert arrays[f"{stem}.row_offsets"].dtype == arrays[f"{stem}.shape"].dtype == np.int64
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        np.testing.assert_array_equal(arrays[name], tensors[name])


def test_packed_folder_opens_like_the_dense_one(packed: Path, dense: Path, tmp_path: Path) -> None:
    params, spec = load_pretrained(packed, dtype=None)
    expected, expected_spec = load_pretrained(dense, dtype=None)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert spec == expected_spec
    assert verify(packed, dense) == ("all 20 tensors are identical", 0)
    export_checkpoint(packed, tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(dense)
    tokens = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(efx_jax.forward(params, tokens, spec), efx_jax.forward(expected, tokens, spec))


def test_tokenizer_is_that_of_the_packed_folder(tiny_folder: Path, tmp_path: Path) -> None:
    pack(tiny_folder, tmp_path / "packed")
    assert load_tokenizer(tmp_path / "packed")("fever lung").input_ids == [3, 9]


def test_parts_are_those_of_the_dense_tensor(
    packed: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where a tensor has many blocks."""
    monkeypatch.setattr("efx_jax.weights.packed_file.BLOCK_BYTES", 300)
    pack(dense, tmp_path / "blocks")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = load_file(dense / "model.safetensors")[name]
    for folder in (packed, tmp_path / "blocks"):
        source = open_checkpoint(folder)
        for rows in (slice(0, 23), slice(3, 4), slice(2, 17), slice(22, 23), slice(4, 8)):
            for columns in (slice(0, 18), slice(5, 6), slice(7, 17)):
                np.testing.assert_array_equal(source.read_part(name, (rows, columns)), expected[rows, columns])
    assert len(json.loads((tmp_path / "blocks" / "packed.json").read_text())["tensors"][name]["crc32"]) > 3


def test_a_mesh_loads_a_packed_folder(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "dense", sparse_params(EVEN), EVEN)
    pack(tmp_path / "dense", tmp_path / "packed")
    params, _ = load_pretrained(tmp_path / "packed", None, make_mesh(MeshConfig(fsdp=2, tensor=2)))
    expected, _ = load_pretrained(tmp_path / "dense", None)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)


def test_matrices_that_would_not_shrink_stay_dense(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "dense", sparse_params(share=0.0), ODD)
    pack(tmp_path / "dense", tmp_path / "packed")
    expected = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(load_file(tmp_path / "packed" / "model.bitmask")) == set(expected)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "dense")


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << offset % 8
    path.write_bytes(data)


@pytest.mark.parametrize("piece", ["compressed", "bitmask", "row_offsets", "shape", "weight"])
def test_a_damaged_byte_is_found_when_it_is_read(piece: str, packed: Path) -> None:
    stem = "model.embed_tokens" if piece == "weight" else "model.layers.0.self_attn.k_proj"
    file = packed / "model.bitmask"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])[f"{stem}.{piece}"]["data_offsets"]
    for offset in range(8 + length + start, 8 + length + end, max(1, (end - start) // 7)):
        _flip(file, offset)
        with pytest.raises(InputError, match=stem):
            load_pretrained(packed)
        file.write_bytes(data)
    load_pretrained(packed)


def test_whatever_byte_flips_the_dense_folder_comes_back_or_nothing_does(packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    refused = 0
    for name in sorted(contents(packed)):
        data = (packed / name).read_bytes()
        for offset in range(0, len(data), len(data) // 25 + 1):
            _flip(packed / name, offset)
            try:
                unpack(packed, tmp_path / "again")
            except InputError:
                refused += 1
                assert not (tmp_path / "again").exists()
            else:
                assert contents(tmp_path / "again") == expected
                # A header has room that says nothing.
                assert name == "model.bitmask"
                shutil.rmtree(tmp_path / "again")
            (packed / name).write_bytes(data)
    assert refused > 60


def test_pickles_code_and_other_weights_are_left_out_by_name(dense: Path, tmp_path: Path) -> None:
    names = {f"other{suffix}" for suffix in (".safetensors", ".bitmask", ".gguf", ".h5", ".msgpack", ".onnx")}
    names |= {f"model{suffix}" for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".PT")}
    names |= {f"code{suffix}" for suffix in (".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh")}
    for name in names:
        (dense / name).touch()
    (dense / ".cache").mkdir()
    (dense / ".cache" / "lock").touch()
    found = pack(dense, tmp_path / "packed")
    assert set(found.left_out) == {*names, ".cache/lock"}
    assert set(contents(tmp_path / "packed")) == {"config.json", "model.bitmask", "packed.json"}


def test_shards_in_folders_of_their_own_are_refused(dense: Path, tmp_path: Path) -> None:
    (dense / "inner").mkdir()
    (dense / "model.safetensors").rename(dense / "inner" / "model.safetensors")
    names = list(load_file(dense / "inner" / "model.safetensors"))
    weight_map = dict.fromkeys(names, "inner/model.safetensors")
    (dense / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(InputError, match="inner/model.safetensors: expected the shards in .*dense itself"):
        pack(dense, tmp_path / "packed")


def test_only_dense_folders_are_packed_and_only_packed_ones_unpacked(packed: Path, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a dense Hugging Face folder"):
        pack(packed, tmp_path / "twice")
    with pytest.raises(InputError, match="is not a packed folder"):
        unpack(dense, tmp_path / "twice")
    with pytest.raises(InputError, match="exists already"):
        pack(dense, packed)


@pytest.mark.parametrize("name", ["../config.json", "/etc/hostname", "a/../../b", "..\\b", "C:b"])
def test_a_manifest_that_names_files_outside_its_folder_is_refused(name: str, packed: Path, tmp_path: Path) -> None:
    """Its seal is right: whoever made it can seal it."""
    manifest = read_sealed(packed / "packed.json")
    manifest["others"] = {name: manifest["others"]["config.json"]}
    write_sealed(packed / "packed.json", manifest)
    with pytest.raises(InputError, match="expected one within its folder"):
        unpack(packed, tmp_path / "again")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("files",), None),
        (("files", "model.safetensors", "bytes"), -1),
        (("files", "model.safetensors", "bytes"), 1 << 40),
        (("files", "model.safetensors", "header"), "[" * 100_000),
        (("files", "model.safetensors", "header"), '{"model.norm.weight":{"dtype":"F32","shape":[-1]}}'),
        (("tensors", "model.norm.weight", "rows"), 0),
        (("tensors", "model.norm.weight"), []),
        (("others", "config.json", "sha256"), 1),
        (("index",), 7),
    ],
)
def test_a_manifest_written_by_hand_is_an_input_error(place: Any, value: Any, packed: Path, tmp_path: Path) -> None:
    fields = manifest = read_sealed(packed / "packed.json")
    for name in place[:-1]:
        fields = fields[name]
    fields[place[-1]] = value
    write_sealed(packed / "packed.json", manifest)
    for work in (lambda: unpack(packed, tmp_path / "again"), lambda: load_pretrained(packed)):
        with pytest.raises(InputError, match=r"packed\.json|model\.safetensors"):
            work()
    assert not (tmp_path / "again").exists()


def test_a_name_that_no_unpacking_takes_is_left_out(dense: Path, tmp_path: Path) -> None:
    (dense / "a\\b.txt").write_text("x")
    assert pack(dense, tmp_path / "packed").left_out == ("a\\b.txt",)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert "a\\b.txt" not in contents(tmp_path / "again")


def test_inspect_says_what_packing_would_give(packed: Path, dense: Path) -> None:
    for folder in (packed, dense):
        lines = dict(line.split(None, 1) for line in inspect(folder).splitlines() if line)
        arrays = load_file(packed / "model.bitmask")
        assert lines["packed"].startswith(f"{sum(array.nbytes for array in arrays.values()):,} bytes")
        tensors = load_file(dense / "model.safetensors")
        assert lines["dense"].startswith(f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes")
        assert lines["down_proj"].endswith("unstructured")


def test_config_json_says_nothing_of_sparsity(packed: Path, dense: Path) -> None:
    assert (packed / "config.json").read_bytes() == (dense / "config.json").read_bytes()
    assert not {"sparsity_config", "quantization_config"} & set(json.loads((packed / "config.json").read_text()))


def test_transformers_refuses_a_packed_folder(packed: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(packed)
