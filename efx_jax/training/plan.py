"""What a run would do, without doing it."""

from collections.abc import Sequence

import numpy as np

from efx_jax.config import Config
from efx_jax.model.spec import linear_shapes
from efx_jax.training.prepare import Prepared
from efx_jax.training.schedule import Event


def plan_text(config: Config, prepared: Prepared, steps: int, events: Sequence[Event]) -> str:
    """The plan of `--dry-run`: sizes, data, steps, events, and the bytes of what stays in memory."""
    spec = prepared.spec
    shapes = linear_shapes(spec)
    linear = spec.num_layers * sum(out_dim * in_dim for out_dim, in_dim in shapes.values())
    total = sum(leaf.size for leaf in _leaves(prepared.params))
    weight_bytes = sum(leaf.nbytes for leaf in _leaves(prepared.params))
    rank = config.lora.rank
    adapter = spec.num_layers * sum(rank * sum(shapes[name]) for name in config.lora.targets)
    mask = spec.num_layers * sum(int(np.prod(shapes[name])) for name in config.prune.targets) if events else 0
    tokens = sum(len(example.tokens) - 1 for example in prepared.train)
    schedule = ", ".join(f"step {event.step} to {event.sparsity:.0%}" for event in events) or "none"
    return "\n".join(
        [
            f"model         {spec.model_type}, {total:,} parameters, {linear:,} in linears",
            f"data          {len(prepared.train):,} sequences, {tokens:,} tokens; "
            f"{len(prepared.task.test):,} test rows, {len(prepared.windows):,} perplexity windows",
            f"training      {steps:,} steps of {config.train.batch_size} sequences, "
            f"{adapter:,} trainable parameters (rank {rank})",
            f"prune events  {schedule}",
            f"memory        weights {weight_bytes / 2**20:,.0f} MiB, masks {mask / 2**20:,.0f} MiB, "
            f"adapters and optimizer {12 * adapter / 2**20:,.0f} MiB",
        ]
    )


def _leaves(params: dict) -> list:
    layers = list(params["layers"].values())
    return layers + [leaf for name, leaf in params.items() if name != "layers"]
