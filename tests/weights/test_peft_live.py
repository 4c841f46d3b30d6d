"""PEFT itself, where torch is installed: it loads what is saved here, and what it has trained is read here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.lora import Adapters
from efx_jax.model.decoder import forward
from efx_jax.weights.hf import load_pretrained, save_pretrained
from efx_jax.weights.peft import load_adapter, save_adapter
from tests.tiny import random_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
TOKENS = np.arange(2 * 12).reshape(2, 12) % 31


def base_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def our_logits(params: Any, spec: Any, adapters: Adapters | None) -> np.ndarray:
    return np.asarray(jax.jit(forward, static_argnums=2)(params, jnp.asarray(TOKENS), spec, adapters))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Any, Any, Adapters, Path]]:
    """`saved(model_type)`: parameters, spec and adapters of a tiny model, and its folder."""

    def save(model_type: str) -> tuple[Any, Any, Adapters, Path]:
        spec, params, adapters = random_model(np.random.default_rng(1), model_type, 4, 2)
        save_pretrained(tmp_path / "base", params, spec)
        return params, spec, adapters, tmp_path / "base"

    return save


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_peft_loads_ours_with_every_key_matched(model_type: str, rslora: bool, saved: Callable, tmp_path: Path) -> None:
    params, spec, adapters, folder = saved(model_type)
    save_adapter(tmp_path / "adapter", adapters, spec, str(folder), rslora=rslora)
    base = base_model(folder)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    outcome = model.load_adapter(tmp_path / "adapter", adapter_name="again")
    assert not outcome.unexpected_keys
    assert not [key for key in outcome.missing_keys if "lora_" in key]
    model.set_adapter("default")
    found = torch_logits(model)
    np.testing.assert_allclose(found, our_logits(params, spec, adapters), rtol=0, atol=1e-4)
    assert np.abs(found - our_logits(params, spec, None)).max() > 0.1


LORAS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"layers.1.mlp.down_proj": 2, "q_proj": 6},
        "alpha_pattern": {"v_proj": 3.0},
        "use_rslora": True,
    },
    "expression": {"target_modules": r".*\.(o|up)_proj", "init_lora_weights": "gaussian"},
    "layers": {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1]},
    "exclude": {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*layers\.0\.mlp.*"},
}


@pytest.mark.parametrize("kind", list(LORAS))
def test_adapter_trained_by_peft_gives_the_same_logits(kind: str, saved: Callable, tmp_path: Path) -> None:
    params, spec, _, folder = saved("qwen3" if kind == "patterns" else "llama")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **LORAS[kind])
    model = peft.get_peft_model(base_model(folder), config)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    tokens = torch.from_numpy(TOKENS)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    found = our_logits(params, spec, load_adapter(tmp_path / "adapter", spec))
    expected = torch_logits(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - our_logits(params, spec, None)).max() > 0.1


def test_adapter_of_a_model_without_head_is_that_of_the_model_with_one(saved: Callable, tmp_path: Path) -> None:
    params, spec, adapters, folder = saved("llama")
    save_adapter(tmp_path / "ours", adapters, spec, str(folder))
    bare = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(bare, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "bare")
    found = load_adapter(tmp_path / "bare", spec)
    ours = our_logits(params, spec, found)
    whole = base_model(folder)
    whole.model = model.merge_and_unload()
    np.testing.assert_allclose(torch_logits(whole), ours, rtol=0, atol=1e-4)


def test_base_is_what_was_saved(saved: Callable) -> None:
    params, spec, _, folder = saved("qwen2")
    read, found = load_pretrained(folder)
    assert found == spec
    np.testing.assert_allclose(torch_logits(base_model(folder)), our_logits(read, spec, None), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(our_logits(read, spec, None), our_logits(params, spec, None))
