"""The names, arguments and promises of `import efx_jax`."""

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efx_jax

# What users call, argument by argument. More arguments may follow, if they have a default.
SIGNATURES = {
    "load_pretrained": "path, dtype='float32'",
    "forward": "params, tokens, spec, adapters=None, masks=None",
    "save_pretrained": "path, params, spec, source=None",
    "load_tokenizer": "path",
    "load_bundle": "path",
    "init_lora": "key, params, spec, rank=8, alpha=16, targets=None",
    "collect_statistics": "params, batches, spec, adapters=None, masks=None, gram=False",
    "prune_event": "params, adapters, masks, stats, state, spec, config",
    "merge": "params, adapters, masks",
    "wanda_score": "weight, input_norm",
    "foresight_score": "weight, input_norm, downstream_norm",
    "select_mask": "score, sparsity, group='row', bound=None",
    "partial_brain_surgeon": "weight, lora_a, mask, input_energy, ridge=1e-08",
    "gram_brain_surgeon": "weight, lora_a, mask, gram, ridge=0.001",
    "admm_update": "weight, mask, gram, target=None, steps=30, damping=0.01",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_arguments_stay(name: str) -> None:
    function = getattr(efx_jax, name)
    documented = SIGNATURES[name].split(", ")
    found = list(inspect.signature(function).parameters.values())
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found]
    assert shown[: len(documented)] == documented
    assert all(p.default is not p.empty and p.kind is not p.VAR_KEYWORD for p in found[len(documented) :])
    assert inspect.getdoc(function)


def test_all_names_exist_and_none_is_missing() -> None:
    assert set(SIGNATURES) <= set(efx_jax.__all__)
    assert sorted(efx_jax.__all__) == list(efx_jax.__all__)
    assert all(getattr(efx_jax, name) is not None for name in efx_jax.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = efx_jax.no_such_name  # type: ignore[attr-defined]


def test_importing_needs_no_hugging_face_library_and_no_torch() -> None:
    heavy = ("transformers", "tokenizers", "datasets", "evaluate", "torch", "gguf", "sklearn", "tyro", "tqdm")
    code = f"""
import sys
import efx_jax
assert not any(name.startswith("efx_jax.weights") for name in sys.modules)
for name in efx_jax.__all__:
    getattr(efx_jax, name)
found = sorted(set({heavy}) & set(sys.modules))
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LAYERS, OUT, IN, RANK = 2, 4, 8, 2


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHT, LORA_A, INPUTS = normal(0, LAYERS, OUT, IN), normal(1, LAYERS, RANK, IN), normal(2, LAYERS, 32, IN)
MASK = normal(3, LAYERS, OUT, IN) > 0
GRAM = np.einsum("lti,ltj->lij", INPUTS, INPUTS)
ENERGY = np.einsum("lii->li", GRAM)
DOWNSTREAM = np.abs(normal(4, LAYERS, OUT))

ARRAY_FUNCTIONS: dict[str, tuple[Callable[..., jax.Array], tuple[np.ndarray, ...]]] = {
    "wanda_score": (efx_jax.wanda_score, (WEIGHT, np.sqrt(ENERGY))),
    "foresight_score": (efx_jax.foresight_score, (WEIGHT, np.sqrt(ENERGY), DOWNSTREAM)),
    "select_mask row": (functools.partial(efx_jax.select_mask, sparsity=0.5), (np.abs(WEIGHT),)),
    "select_mask matrix": (functools.partial(efx_jax.select_mask, sparsity=0.3, group="matrix"), (np.abs(WEIGHT),)),
    "select_mask 2:4": (functools.partial(efx_jax.select_mask, sparsity=0.5, group="2:4"), (np.abs(WEIGHT),)),
    "select_mask bounded": (
        functools.partial(efx_jax.select_mask, sparsity=0.5, group="bounded", bound=0.2),
        (np.abs(WEIGHT),),
    ),
    "partial_brain_surgeon": (efx_jax.partial_brain_surgeon, (WEIGHT, LORA_A, MASK, ENERGY)),
    "gram_brain_surgeon": (efx_jax.gram_brain_surgeon, (WEIGHT, LORA_A, MASK, GRAM)),
    "admm_update": (functools.partial(efx_jax.admm_update, steps=5), (WEIGHT, MASK, GRAM)),
}


@pytest.mark.parametrize("name", ARRAY_FUNCTIONS)
def test_array_functions_run_under_jit_and_vmap_over_layers(name: str) -> None:
    function, stacked = ARRAY_FUNCTIONS[name]
    together = np.asarray(jax.jit(jax.vmap(function))(*stacked))
    for layer in range(LAYERS):
        alone: Any = np.asarray(function(*(jnp.asarray(array[layer]) for array in stacked)))
        assert together[layer].dtype == alone.dtype == (bool if "mask" in name else np.float32)
        np.testing.assert_allclose(together[layer], alone, atol=1e-5 * max(1.0, np.abs(alone).max()))


def test_statics_may_be_named_as_such_under_jit() -> None:
    select = jax.jit(efx_jax.select_mask, static_argnames=("sparsity", "group", "bound"))
    assert select(np.abs(WEIGHT[0]), 0.5, group="matrix").sum() == OUT * IN // 2
    update = jax.jit(efx_jax.admm_update, static_argnames="steps")
    assert not np.asarray(update(WEIGHT[0], MASK[0], GRAM[0], steps=3))[~MASK[0]].any()
