"""EfficientXpert in JAX: sparse domain experts by pruning a model while it is LoRA fine-tuned (arXiv 2511.19935)."""

from typing import Any

from efx_jax.lora import Adapters, init_lora, merge
from efx_jax.model.decoder import forward
from efx_jax.model.spec import ModelSpec
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.output_gradient import output_gradient_energy
from efx_jax.pruning.recovery import admm_update, gram_brain_surgeon, partial_brain_surgeon
from efx_jax.pruning.scores import foresight_score, wanda_score
from efx_jax.pruning.selection import select_mask
from efx_jax.pruning.statistics import collect_statistics

_FROM_WEIGHTS = ("load_bundle", "load_pretrained", "load_tokenizer", "save_pretrained")

__all__ = [
    "Adapters",
    "ModelSpec",
    "admm_update",
    "collect_statistics",
    "foresight_score",
    "forward",
    "gram_brain_surgeon",
    "init_lora",
    "load_bundle",
    "load_pretrained",
    "load_tokenizer",
    "merge",
    "output_gradient_energy",
    "partial_brain_surgeon",
    "prune_event",
    "save_pretrained",
    "select_mask",
    "wanda_score",
]


def __getattr__(name: str) -> Any:
    """Imports `weights` on first use, so that importing the core does not load file-format libraries."""
    if name not in _FROM_WEIGHTS:
        raise AttributeError(f"module 'efx_jax' has no attribute {name!r}")
    from efx_jax.weights import bundle, hf

    return {
        "load_bundle": bundle.load_bundle,
        "load_pretrained": hf.load_pretrained,
        "load_tokenizer": hf.load_tokenizer,
        "save_pretrained": hf.save_pretrained,
    }[name]
