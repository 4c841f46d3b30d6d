"""A tiny run that stands before its first event."""

import dataclasses

import jax
import numpy as np

from efx_jax.config import Config
from efx_jax.data.tokens import Tokenized
from efx_jax.lora import init_lora
from efx_jax.model.spec import ModelSpec, init_params
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import tree_shardings
from efx_jax.pruning.average import init_prune_state
from efx_jax.training.prepare import Prepared
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import RunState, init_train_state


def start(config: Config, spec: ModelSpec) -> tuple[Prepared, RunState]:
    """Adapters that training has moved, on the mesh of `config`, and rows to train and to calibrate on."""
    rng = np.random.default_rng(1)
    rows = [Tokenized(rng.integers(0, 32, 17).astype(np.int32), np.ones(17, bool)) for _ in range(8)]
    params = init_params(jax.random.key(0), spec)
    adapters = init_lora(jax.random.key(1), params, spec, config.lora.rank)
    lora_b = {name: b + 0.02 * rng.standard_normal(b.shape).astype(np.float32) for name, b in adapters.lora_b.items()}
    adapters = dataclasses.replace(adapters, lora_b=lora_b)
    prune = init_prune_state(params, adapters, config.prune, jax.random.key(2), 2)
    tree = {"train": init_train_state(adapters, optimizer(config.train, 4)), "params": params, "prune": prune}
    tree = jax.device_put(tree, tree_shardings(make_mesh(config.mesh), tree))
    prepared = Prepared(tree["params"], spec, None, None, rows, [], (rows,))  # type: ignore[arg-type]
    return prepared, RunState(tree["train"], tree["params"], {}, tree["prune"])
