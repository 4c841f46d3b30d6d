"""Models described without weights: shipped shapes, folders, files, names."""

import json
import math
from pathlib import Path

import jax
import pytest

from efx_jax.errors import InputError
from efx_jax.model.spec import config_from_spec, linear_shapes, param_shapes, spec_from_config
from efx_jax.weights.convert import import_checkpoint
from efx_jax.weights.hf import load_pretrained, save_pretrained
from efx_jax.weights.shapes import find_spec, known_shapes
from tests.tiny import LLAMA

# Parameter counts that the checkpoints' own safetensors indexes state; where a tied head is stored twice, once.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-135m-instruct": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_shape_has_its_published_number_of_parameters() -> None:
    found = {}
    for stem, config in known_shapes().items():
        leaves = jax.tree.leaves(param_shapes(spec_from_config(config)), is_leaf=lambda node: isinstance(node, tuple))
        found[stem] = sum(math.prod(shape) for shape in leaves)
    assert found == PUBLISHED


@pytest.mark.parametrize(("stem", "billions"), [("llama-2-7b", 6.476), ("llama-3.1-8b", 6.979), ("qwen3-8b", 6.946)])
def test_prunable_weights_are_those_of_the_accounting(stem: str, billions: float) -> None:
    spec = find_spec(stem).spec
    assert round(spec.num_layers * sum(o * i for o, i in linear_shapes(spec).values()) / 1e9, 3) == billions


def test_a_shape_answers_to_its_hub_name_and_to_its_file_name() -> None:
    by_name, by_stem = find_spec("meta-llama/Llama-2-7b-hf"), find_spec("llama-2-7b")
    assert by_name == by_stem == find_spec("meta-llama/Llama-2-7b-hf@main")
    assert (by_name.dtype, by_name.on_disk) == ("float16", False)
    assert len({config["_name_or_path"] for config in known_shapes().values()}) == len(known_shapes())


def test_instruct_models_stop_at_more_tokens_than_their_base() -> None:
    assert find_spec("llama-3.1-8b-instruct").spec.eos_token_ids == (128001, 128008, 128009)
    assert find_spec("llama-3.1-8b").spec.eos_token_ids == (128001,)


def test_a_folder_needs_no_weights_to_be_described(tmp_path: Path) -> None:
    config = known_shapes()["smollm2-135m"] | {"torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = find_spec(tmp_path)
    assert (found.spec.hidden_size, found.dtype, found.on_disk) == (576, "float32", True)


def test_a_checkpoint_on_disk_is_described_by_its_own_files(tiny_folder: Path) -> None:
    found = find_spec(tiny_folder)
    assert (found.spec.hidden_size, found.spec.num_layers, found.on_disk) == (16, 2, True)


def test_a_folder_of_nothing_but_json_files_describes_a_model(tmp_path: Path) -> None:
    """As a Hub's folder fetched without its weights: an index promises shards that a plan does not need."""
    (tmp_path / "config.json").write_text(json.dumps(config_from_spec(LLAMA, "bfloat16")))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "1.safetensors"}}')
    found = find_spec(tmp_path)
    assert (found.spec.hidden_size, found.dtype) == (LLAMA.hidden_size, "bfloat16")


def test_a_home_folder_is_found(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert find_spec(f"~/{tiny_folder.name}") == find_spec(tiny_folder)


def test_the_dtype_is_that_of_the_weights(tiny_folder: Path, tmp_path: Path) -> None:
    import_checkpoint(tiny_folder, tmp_path / "narrow", "bfloat16")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "float32"
    assert find_spec(tmp_path / "narrow").dtype == "bfloat16"
    assert find_spec(tiny_folder).dtype == "float32"


def test_a_few_wide_norms_do_not_make_a_model_wide(tiny_folder: Path, tmp_path: Path) -> None:
    params, spec = load_pretrained(tiny_folder, "float16")
    save_pretrained(tmp_path / "mixed", params | {"norm": params["norm"].astype("float32")}, spec)
    assert find_spec(tmp_path / "mixed").dtype == "float16"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="no such file or folder.*llama-2-7b.*qwen3-8b"):
        find_spec("llama-9-7b")


# The errors of the network libraries below the Hub's client are no OSErrors.
@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_name_that_the_hub_does_not_give_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(name: str, file: str, revision: None) -> str:
        raise error(f"cannot reach {name}/{file}\nmore lines")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"does not give its config.json \(cannot reach someone/model/config.json\)"):
        find_spec("someone/model")


def test_of_a_hub_model_only_its_config_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text(json.dumps(known_shapes()["qwen3-0.6b"]))
    asked: list[tuple[str, str, str | None]] = []

    def give(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", give)
    found = find_spec("someone/model")
    assert (found.spec.model_type, found.dtype, found.on_disk) == ("qwen3", "bfloat16", False)
    assert "someone/model@main" in find_spec("someone/model@main").origin
    assert asked == [("someone/model", "config.json", None), ("someone/model", "config.json", "main")]
