"""Patterns found in files, and the audit of an export."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from efx_jax.config_event import n_of_m
from efx_jax.errors import InputError
from efx_jax.model.spec import LINEARS, param_shapes, spec_from_config
from efx_jax.weights.expert import write_expert
from efx_jax.weights.hf import open_checkpoint, save_pretrained
from efx_jax.weights.inspect import inspect
from efx_jax.weights.source import TensorSource
from efx_jax.weights.sparsity import Asked, count_zeros, pruned_entries
from tests.tiny import EVEN

DOWN = "model.layers.1.mlp.down_proj.weight"


def masks_of(kept: int, size: int) -> dict[str, np.ndarray]:
    """Random masks of all linears that keep so many of `size` consecutive inputs, half of a row where it is 0."""
    rng = np.random.default_rng(0)
    masks = {}
    for name in LINEARS:
        shape = param_shapes(EVEN)["layers"][name]
        groups = rng.random(shape).reshape(*shape[:2], -1, size or shape[2])
        places = np.argsort(np.argsort(groups, axis=-1), axis=-1)
        masks[name] = (places < (kept or shape[2] // 2)).reshape(shape)
    return masks


def export(folder: Path, masks: dict[str, np.ndarray], pattern: str, sparsity: float = 0.5) -> Path:
    """An export of masks alone; its base is a folder beside it."""
    base = folder / "base"
    rng = np.random.default_rng(1)
    shapes = param_shapes(EVEN)
    params = {name: rng.random(shape, np.float32) for name, shape in shapes.items() if name != "layers"}
    layers = {name: rng.random(shape, np.float32) for name, shape in shapes["layers"].items()}
    save_pretrained(base, params | {"layers": layers}, EVEN)
    source = open_checkpoint(base)
    spec = spec_from_config(source.config)
    asked = Asked(dict.fromkeys(masks, pattern), sparsity, pruned_entries(masks, spec))
    write_expert(folder / "export", source, spec, None, masks, base, asked)
    return folder / "export"


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "6:16", "unstructured"])
def test_the_pattern_is_found_written_and_shown(pattern: str, tmp_path: Path) -> None:
    kept, size = n_of_m(pattern) or (0, 0)
    sparsity = 1 - kept / size if size else 0.5
    folder = export(tmp_path, masks_of(kept, size), pattern, sparsity)
    lines = {line.split()[0]: line.split()[-1] for line in inspect(folder).splitlines() if "_proj" in line}
    assert lines == dict.fromkeys(LINEARS, pattern)
    report = json.loads((folder / "efx_sparsity.json").read_text())
    assert (report["pattern"], report["sparsity_asked"]) == (pattern, sparsity)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata[DOWN] == f"{pattern} {sparsity:.6f}"
    assert metadata["model.norm.weight"] == "dense 0.000000"
    assert metadata["format"] == "pt"


def test_the_report_counts_what_the_file_holds(tmp_path: Path) -> None:
    folder = export(tmp_path, masks_of(0, 0), "unstructured", 0.25)
    report: dict[str, Any] = json.loads((folder / "efx_sparsity.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert set(report["tensors"]) == set(tensors)
    for name, found in report["tensors"].items():
        tensor = tensors[name]
        assert found["shape"] == list(tensor.shape)
        assert found["zeros"] == (tensor == 0).sum()
        assert found["sparsity"] == (tensor == 0).mean()
        if found["pattern"] == "dense":
            assert "proj" not in name and "mask_sha256" not in found
        else:
            bits = np.packbits(tensor != 0, axis=-1, bitorder="little")
            assert found["mask_sha256"] == hashlib.sha256(bits.tobytes()).hexdigest()
    linears = [tensor for name, tensor in tensors.items() if "_proj" in name]
    assert report["linears"]["zeros"] == sum(int((tensor == 0).sum()) for tensor in linears)
    assert report["linears"]["entries"] == sum(tensor.size for tensor in linears)
    assert not {"sparsity_config", "quantization_config"} & set(json.loads((folder / "config.json").read_text()))


def test_a_group_that_keeps_too_many_is_an_error(tmp_path: Path) -> None:
    masks = masks_of(2, 4)
    group = np.array(masks["down_proj"])
    group[1, 3, 4:8] = True
    with pytest.raises(
        InputError, match=r"^export: model.layers.1.mlp.down_proj.weight keeps 4 of 4 consecutive inputs"
    ):
        export(tmp_path, masks | {"down_proj": group}, "2:4")
    assert not (tmp_path / "export").exists()


def test_a_group_of_hundreds_is_counted(tmp_path: Path) -> None:
    values = np.ones((2, 512), np.float32)
    source = TensorSource(tmp_path, {}, {"w": values.shape}, {"w": "float32"}, lambda name, part: values[part])
    assert count_zeros(source, "w", (256, 512)).fullest == {256: 256, 512: 512}


def test_fewer_zeros_than_were_pruned_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the merge had lost a zero."""
    from efx_jax.weights import merged

    def lossy(*arguments: Any) -> np.ndarray:
        rows = exact(*arguments)
        return np.where(rows == 0, np.float32(1e-30), rows) if rows.shape == (32, 64) else rows

    exact = merged.merged_rows
    monkeypatch.setattr(merged, "merged_rows", lossy)
    with pytest.raises(InputError, match=r"down_proj.weight has 0 zeros, expected the 1,024 that its mask prunes"):
        export(tmp_path, masks_of(0, 0), "unstructured")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
