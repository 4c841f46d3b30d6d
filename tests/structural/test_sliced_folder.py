"""The exported folder of a sliced model: opened by us and, where torch is installed, by transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.lora import merge
from efx_jax.model.decoder import forward
from efx_jax.structural.slicing import promise, slice_model
from efx_jax.weights.hf import load_pretrained, save_pretrained
from efx_jax.weights.safetensors_file import read_header
from efx_jax.weights.sliced import save_sliced

CASES = ("llama", "llama-mha-tied", "llama-biases", "qwen2", "qwen3")


def test_file_holds_the_promised_parameters_and_opens_again(
    make_tiny: Callable, draw_masks: Callable, tmp_path: Path
) -> None:
    tiny = make_tiny("qwen3")
    unit_masks = draw_masks(tiny.spec, "sliceable")
    params, _, spec = slice_model(tiny.params, None, unit_masks, tiny.spec, "sliceable")
    save_sliced(tmp_path / "small", params, spec)
    entries = read_header(tmp_path / "small" / "model.safetensors")
    written = sum(int(np.prod(entry.shape)) for entry in entries.values())
    assert written == promise(unit_masks, tiny.spec, "sliceable").written
    loaded, found = load_pretrained(tmp_path / "small")
    assert found == spec
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_source_gives_everything_but_the_sizes(make_tiny: Callable, draw_masks: Callable, tmp_path: Path) -> None:
    tiny = make_tiny("llama")
    save_pretrained(tmp_path / "large", tiny.params, tiny.spec)
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    (tmp_path / "large" / "config.json").write_text(json.dumps({**config, "a_key_of_its_own": 7}))
    (tmp_path / "large" / "generation_config.json").write_text('{"max_new_tokens": 3}')
    unit_masks = draw_masks(tiny.spec, "sliceable")
    unit_masks["heads"][:, 1] = False
    params, _, spec = slice_model(tiny.params, None, unit_masks, tiny.spec, "sliceable")
    save_sliced(tmp_path / "small", params, spec, tmp_path / "large")
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    assert written["a_key_of_its_own"] == 7
    assert (written["num_attention_heads"], written["num_key_value_heads"], written["head_dim"]) == (2, 1, 4)
    assert written["intermediate_size"] == spec.intermediate_size < tiny.spec.intermediate_size
    assert (tmp_path / "small" / "generation_config.json").read_text() == '{"max_new_tokens": 3}'


def test_another_source_is_refused(make_tiny: Callable, draw_masks: Callable, tmp_path: Path) -> None:
    tiny, other = make_tiny("llama"), make_tiny("qwen2")
    save_pretrained(tmp_path / "other", other.params, other.spec)
    params, _, spec = slice_model(tiny.params, None, draw_masks(tiny.spec, "sliceable"), tiny.spec, "sliceable")
    with pytest.raises(InputError, match="model_type is qwen2, but the parameters' spec has llama"):
        save_sliced(tmp_path / "small", params, spec, tmp_path / "other")


@pytest.mark.parametrize("space", ["paper", "sliceable"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_it_with_the_logits_of_the_masked_model(
    case: str, space: str, make_tiny: Callable, draw_masks: Callable, zero_by_hand: Callable, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny = make_tiny(case)
    unit_masks = draw_masks(tiny.spec, space)
    params, adapters, spec = slice_model(tiny.params, tiny.adapters, unit_masks, tiny.spec, space)
    save_sliced(tmp_path / "small", merge(params, adapters, None), spec)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert model.num_parameters() == promise(unit_masks, tiny.spec, space).written
    with torch.no_grad():
        found = model(torch.tensor(tiny.tokens, dtype=torch.long)).logits.numpy()
    masked = zero_by_hand(merge(tiny.params, tiny.adapters, None), unit_masks, tiny.spec)
    expected = np.asarray(forward(masked, tiny.tokens, tiny.spec))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.max(np.abs(expected)), rtol=0)
