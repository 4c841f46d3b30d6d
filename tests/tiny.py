"""The tiny models of the tests; where a test needs another number, `dataclasses.replace` names it there."""

import dataclasses

from efx_jax.model.rope import RopeSpec
from efx_jax.model.spec import ModelSpec

LLAMA = ModelSpec(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=64,
    rope=RopeSpec(),
)
# Eight devices divide it along any axis.
EVEN = dataclasses.replace(LLAMA, hidden_size=32, intermediate_size=64, num_heads=8, num_kv_heads=4)
