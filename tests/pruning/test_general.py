"""General importance of a whole model: each block swept behind the swept blocks before it."""

from typing import Any

import jax
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.pruning.general import general_importance
from efx_jax.pruning.sparsegpt import sparsegpt
from efx_jax.pruning.statistics import collect_statistics

NAMES = ("v_proj", "down_proj")


def test_every_block_is_swept_on_the_outputs_of_the_swept_ones(llama: Any) -> None:
    batches = [{**batch, "lengths": np.where(np.arange(8) < 6, batch["lengths"], 0)} for batch in llama.batches]
    found = general_importance(llama.params, batches, llama.spec, NAMES, sparsity=0.5)
    sweep = jax.jit(sparsegpt, static_argnums=(2,))
    layers = llama.params["layers"]
    swept = {name: np.array(layers[name]) for name in NAMES}
    for index in range(llama.spec.num_layers):
        model = {**llama.params, "layers": layers | swept}
        stats = collect_statistics(model, batches, llama.spec, gram=True)
        for name in NAMES:
            # Twelve of the sixteen rows are sequences, the others padding.
            expected = sweep(layers[name][index], stats.input_gram(name)[index] * 2 / 12, 0.5)
            np.testing.assert_allclose(found[name][index], expected.importance, rtol=1e-3)
            swept[name][index] = expected.weight


def test_text_without_a_real_token_is_refused_with_one_line(llama: Any) -> None:
    empty = {"tokens": llama.batches[0]["tokens"], "lengths": np.zeros(8, np.int32)}
    with pytest.raises(InputError, match="expected at least one real token, found none") as caught:
        general_importance(llama.params, [empty], llama.spec, NAMES)
    assert "\n" not in str(caught.value)
