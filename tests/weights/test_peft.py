"""PEFT folders written by hand mean here what PEFT means by them; whatever else they hold is refused by name."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.weights.peft import adapter_settings, load_adapter, save_adapter
from tests.tiny import LLAMA, random_model
from tests.weights.adapter_folders import LINEARS, delta, module, tensors_for, write_adapter


def everywhere(layer: int, name: str) -> int:
    return 3


def found_delta(adapters: Adapters, layer: int, name: str) -> np.ndarray:
    half_a, half_b = (np.asarray(half[name][layer], np.float64) for half in (adapters.lora_a, adapters.lora_b))
    return adapters.scale * half_b @ half_a


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_adapter(folder, LLAMA)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.{module}.lora_{half}.weight",
        "base_model.model.{module}.lora_{half}.default.weight",
        "{module}.lora_{half}.weight",
    ],
)
def test_uniform_adapter_is_taken_as_it_is(tmp_path: Path, key: str, dtype: str) -> None:
    tensors = tensors_for(LLAMA, everywhere, key, dtype=dtype)
    adapters = load_adapter(write_adapter(tmp_path / "adapter", tensors), LLAMA)
    assert adapters.scale == 2.0
    for name in LINEARS:
        for half, stacked in (("A", adapters.lora_a[name]), ("B", adapters.lora_b[name])):
            expected = [tensors[key.format(module=module(layer, name), half=half)] for layer in range(2)]
            np.testing.assert_array_equal(np.asarray(stacked), np.stack(expected).astype(np.float32))


def test_adapter_of_a_model_without_head_is_read(tmp_path: Path) -> None:
    tensors = tensors_for(LLAMA, everywhere, head="")
    adapters = load_adapter(write_adapter(tmp_path / "adapter", tensors), LLAMA)
    np.testing.assert_allclose(found_delta(adapters, 1, "up_proj"), delta(tensors, 1, "up_proj", 2.0, head=""), 1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_their_own_give_the_same_update(tmp_path: Path, rslora: bool) -> None:
    ranks = {(0, "q_proj"): 5, (1, "q_proj"): 5, (1, "down_proj"): 1}
    alphas = {(0, "v_proj"): 1.5, (1, "v_proj"): 1.5, (0, "down_proj"): 16, (1, "down_proj"): 16}
    tensors = tensors_for(LLAMA, lambda layer, name: ranks.get((layer, name), 3))
    folder = write_adapter(
        tmp_path / "adapter",
        tensors,
        use_rslora=rslora,
        rank_pattern={"self_attn.q_proj": 5, r".*\.1\.mlp\.down_proj": 1},
        alpha_pattern={"v_proj": 1.5, "^model.layers.[01].mlp.down_proj": 16},
    )
    adapters = load_adapter(folder, LLAMA)
    assert {half.shape[1] for half in adapters.lora_a.values()} == {5}
    for layer in range(2):
        for name in LINEARS:
            rank, alpha = ranks.get((layer, name), 3), alphas.get((layer, name), 6)
            expected = delta(tensors, layer, name, alpha / (math.sqrt(rank) if rslora else rank))
            np.testing.assert_allclose(found_delta(adapters, layer, name), expected, rtol=1e-5, atol=1e-6)
    settings = adapter_settings(folder)
    assert (settings.rank, settings.rslora) == (5, rslora)
    assert adapters.scale == pytest.approx(settings.alpha / (math.sqrt(5) if rslora else 5), rel=1e-15)


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["q_proj", "mlp.up_proj"], lambda layer, name: name in ("q_proj", "up_proj")),
        (["model.layers.1.self_attn.k_proj"], lambda layer, name: (layer, name) == (1, "k_proj")),
        (r".*\.0\.self_attn\.[vo]_proj", lambda layer, name: layer == 0 and name in ("v_proj", "o_proj")),
        ("all-linear", lambda layer, name: True),
    ],
)
def test_targets_are_names_an_expression_or_all(tmp_path: Path, targets: Any, adapted: Any) -> None:
    tensors = tensors_for(LLAMA, lambda layer, name: 3 if adapted(layer, name) else None)
    folder = write_adapter(tmp_path / "adapter", tensors, target_modules=targets)
    adapters = load_adapter(folder, LLAMA)
    names = [name for name in LINEARS if any(adapted(layer, name) for layer in range(2))]
    assert tuple(adapters.lora_a) == adapter_settings(folder).targets == tuple(names)
    for layer in range(2):
        for name in names:
            size = np.abs(found_delta(adapters, layer, name)).max()
            assert (size > 0) == adapted(layer, name)


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"exclude_modules": r"model\.layers\.0\..*"},
    ],
)
def test_layer_without_adapter_gets_zeros(tmp_path: Path, options: dict[str, Any]) -> None:
    tensors = tensors_for(LLAMA, lambda layer, name: 3 if layer == 1 else None)
    adapters = load_adapter(write_adapter(tmp_path / "adapter", tensors, **options), LLAMA)
    for name in LINEARS:
        assert not np.asarray(adapters.lora_a[name][0]).any() and not np.asarray(adapters.lora_b[name][0]).any()
        np.testing.assert_allclose(found_delta(adapters, 1, name), delta(tensors, 1, name, 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "option use_dora = true"),
        ({"bias": "all"}, 'option bias = "all"'),
        ({"modules_to_save": ["lm_head"]}, "option modules_to_save"),
        ({"lora_bias": True}, "option lora_bias"),
        ({"fan_in_fan_out": True}, "option fan_in_fan_out"),
        ({"trainable_token_indices": [3]}, "option trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "option layer_replication"),
        ({"target_parameters": ["x"]}, "option target_parameters"),
        ({"use_an_idea_of_next_year": True}, "option use_an_idea_of_next_year"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' has moved the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' has moved the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' has moved the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda' has moved the base"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga' has moved the base"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"target_modules": [*LINEARS, "lm_head"]}, "target_modules names lm_head"),
        ({"target_modules": [*LINEARS, "embed_tokens"]}, "target_modules names model.embed_tokens"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": "(q_proj"}, "is no regular expression"),
        ({"rank_pattern": {"(?i)Q_PROJ": 3}}, "is no regular expression"),
        ({"layers_pattern": ["("], "layers_to_transform": [0, 1]}, "is no regular expression"),
        ({"layers_pattern": ["(a|layers)"], "layers_to_transform": [0, 1]}, "has a group"),
        ({"lora_alpha": 10**400}, "expected a number above 0 that float32 holds"),
        ({"target_modules": ["q_proj"]}, "belongs to no module that adapter_config.json adapts"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
        ({"r": 0}, "r is 0, expected an integer of at least 1"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number above 0"),
        ({"r": 4}, "has shape [3, 24], expected [4, 24]"),
        ({"rank_pattern": {"up_proj": 2}}, "has shape [3, 16], expected [2, 16]"),
    ],
)
def test_option_that_is_not_computed_here_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    assert words in refusal(write_adapter(tmp_path / "adapter", tensors_for(LLAMA, everywhere), **options))


def test_what_peft_writes_beside_is_not_refused(tmp_path: Path) -> None:
    idle = {
        "auto_mapping": None,
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "loftq_config": {},
        "init_lora_weights": "gaussian",
        "use_dora": False,
        "task_type": "CAUSAL_LM",
        "peft_version": "0.21.2",
        "trainable_token_indices": None,
    }
    load_adapter(write_adapter(tmp_path / "adapter", tensors_for(LLAMA, everywhere), **idle), LLAMA)


KEY = "base_model.model.model.layers.1.self_attn.k_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("lost", "added", "words"),
    [
        ([KEY.format("B")], {}, f"tensor {KEY.format('B')} is missing beside {KEY.format('A')}"),
        ([KEY.format("A")], {}, f"tensor {KEY.format('A')} is missing beside {KEY.format('B')}"),
        ([KEY.format("A"), KEY.format("B")], {}, "the tensors of model.layers.1.self_attn.k_proj are missing"),
        ([], {"base_model.model.lm_head.weight": (32, 16)}, "tensor base_model.model.lm_head.weight is no adapter"),
        ([], {KEY.format("A").replace("k_proj", "x_proj"): (3, 16)}, "x_proj.lora_A.weight is no adapter"),
        ([], {KEY.format("magnitude_vector"): (3,)}, "lora_magnitude_vector.weight is no adapter"),
        ([], {KEY.format("A.other"): (3, 16)}, "are the same tensor of two adapters"),
        ([KEY.format("A")], {KEY.format("A"): (16, 3)}, "has shape [16, 3], expected [3, 16]"),
        (
            [],
            {
                KEY.format(half).replace("layers.1", "layers.2"): shape
                for half, shape in (("A", (3, 16)), ("B", (8, 3)))
            },
            "has no place in a llama model of 2 layers",
        ),
    ],
)
def test_unmatched_missing_and_misshaped_tensors_are_refused_by_name(
    tmp_path: Path, lost: list[str], added: dict[str, tuple[int, ...]], words: str
) -> None:
    tensors = tensors_for(LLAMA, everywhere)
    tensors = {key: value for key, value in tensors.items() if key not in lost}
    tensors |= {key: np.ones(shape, np.float32) for key, shape in added.items()}
    assert words in refusal(write_adapter(tmp_path / "adapter", tensors))


def test_number_that_is_not_finite_is_refused_with_its_place(tmp_path: Path) -> None:
    tensors = tensors_for(LLAMA, everywhere)
    tensors[KEY.format("A")][1, 7] = np.nan
    assert f"tensor {KEY.format('A')} holds nan at [1, 7]" in refusal(write_adapter(tmp_path / "adapter", tensors))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    folder = write_adapter(tmp_path / "adapter", tensors_for(LLAMA, everywhere))
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "cannot be read as safetensors" in refusal(folder)
    weights.rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in refusal(folder)
    save_file({}, weights)
    assert "holds no tensor" in refusal(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in refusal(folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_saved_adapter_comes_back_to_the_bit(tmp_path: Path, rslora: bool) -> None:
    spec, _, adapters = random_model(np.random.default_rng(0), "qwen3", 4, 2)
    save_adapter(tmp_path / "adapter", adapters, spec, "some/base", rslora=rslora)
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", None)
    assert (config["r"], config["use_rslora"]) == (3, rslora)
    assert config["lora_alpha"] == (pytest.approx(2 * math.sqrt(3)) if rslora else 6)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    read = load_adapter(tmp_path / "adapter", spec)
    assert read.scale == pytest.approx(adapters.scale, rel=1e-15)
    for name in LINEARS:
        np.testing.assert_array_equal(np.asarray(read.lora_a[name]), np.asarray(adapters.lora_a[name]))
        np.testing.assert_array_equal(np.asarray(read.lora_b[name]), np.asarray(adapters.lora_b[name]))
        expected = delta(tensors, 1, name, config["lora_alpha"] / (math.sqrt(3) if rslora else 3))
        np.testing.assert_allclose(found_delta(adapters, 1, name), expected, rtol=1e-5, atol=1e-6)


def test_a_base_of_a_revision_is_named_as_peft_names_it(tmp_path: Path) -> None:
    spec, _, adapters = random_model(np.random.default_rng(0), "qwen3", 4, 2)
    save_adapter(tmp_path / "hub", adapters, spec, "some/base@v1.0")
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", "v1.0")
    save_adapter(tmp_path / "folder", adapters, spec, str(tmp_path / "my@base"))
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tmp_path / "my@base"), None)


def test_saving_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    spec, _, adapters = random_model(np.random.default_rng(0), "llama", 4, 2)
    save_adapter(tmp_path / "adapter", adapters, spec, "base")
    with pytest.raises(InputError, match="exists already"):
        save_adapter(tmp_path / "adapter", adapters, spec, "base")
    with pytest.raises(InputError, match=r"gate_proj is \[2, 3, 16\] and \[2, 24, 3\], expected .* and \[2, 32, 3\]"):
        save_adapter(tmp_path / "other", adapters, dataclasses.replace(spec, intermediate_size=32), "base")
    huge = adapters.replace(lora_b={name: 1e6 + half for name, half in adapters.lora_b.items()})
    with pytest.raises(InputError, match="not finite in float16; choose float32"):
        save_adapter(tmp_path / "half", huge, spec, "base", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
