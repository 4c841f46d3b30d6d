"""Where tensors come from, and how Hugging Face's names map to the parameter tree."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec, param_shapes
from efx_jax.weights.byte_ranges import Part, row_blocks, whole

DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

_FLOAT16_MAX = 65504.0

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Tree name -> Hugging Face name; {} stands for the layer.
_TOP = {"embed_tokens": EMBEDDING, "norm": "model.norm.weight", "lm_head": HEAD}
_MODULES = {
    "input_layernorm": "model.layers.{}.input_layernorm",
    "q_proj": "model.layers.{}.self_attn.q_proj",
    "k_proj": "model.layers.{}.self_attn.k_proj",
    "v_proj": "model.layers.{}.self_attn.v_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "o_proj": "model.layers.{}.self_attn.o_proj",
    "post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
    "gate_proj": "model.layers.{}.mlp.gate_proj",
    "up_proj": "model.layers.{}.mlp.up_proj",
    "down_proj": "model.layers.{}.mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """A checkpoint, read one tensor or one part of a tensor at a time, whatever its format.

    Attributes:
        path: the folder or file, for messages and for the tokenizer beside the weights.
        config: raw JSON of its `config.json` (made from the metadata if the format has none).
        shapes: Hugging Face tensor name -> shape, in Hugging Face's layout (`[O, I]`, nothing permuted).
        dtypes: Hugging Face tensor name -> "float32", "bfloat16" or "float16": the dtype that `read_part` gives.
        read_part: Hugging Face tensor name, a slice per axis -> those entries.
        own_parts: Hugging Face tensor name -> the parts that this process has to write, which are all that it can read;
            None: all of every tensor.
        shared: whether the tensors are spread over the run's processes, each of which holds its own parts.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read_part: Callable[[str, Part], np.ndarray]
    own_parts: Callable[[str], list[Part]] | None = None
    shared: bool = False

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        return self.read_part(name, whole(self.shapes[name]))

    def parts(self, name: str) -> list[Part]:
        """The parts of a tensor that this process has to write."""
        return [whole(self.shapes[name])] if self.own_parts is None else self.own_parts(name)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree: its path in the tree and its tensors, one per layer if it is stacked."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return len(self.path) == 2

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape


def leaves(spec: ModelSpec) -> list[Leaf]:
    """The leaves of `param_shapes(spec)` with the Hugging Face names of their tensors."""
    shapes = param_shapes(spec)
    top = [Leaf((name,), shapes[name], (_TOP[name],)) for name in shapes if name != "layers"]
    layers = [
        Leaf(("layers", name), shape, tuple(_layer_name(name).format(i) for i in range(spec.num_layers)))
        for name, shape in shapes["layers"].items()
    ]
    return top[:1] + layers + top[1:]


def leaf_dtype(source: TensorSource, leaf: Leaf) -> str:
    """The dtype that holds all of a leaf's layers exactly: their own if they agree, else float32."""
    distinct = {source.dtypes[name] for name in leaf.names}
    return distinct.pop() if len(distinct) == 1 else "float32"


def check_names_and_shapes(source: TensorSource, spec: ModelSpec) -> None:
    """Refuses a checkpoint whose tensors are not exactly the spec's; reads no tensor.

    Rotary buffers of old checkpoints are ignored, and a tied model may also hold its `lm_head.weight`.

    Raises:
        InputError: a missing, unknown or wrongly shaped tensor.
    """
    expected = {name: leaf.tensor_shape for leaf in leaves(spec) for name in leaf.names}
    missing = [name for name in expected if name not in source.shapes]
    if missing:
        raise InputError(
            f"{source.path}: tensor {missing[0]} is missing ({len(missing)} in all); get a complete checkpoint"
        )
    if spec.tie_word_embeddings:
        expected[HEAD] = expected[EMBEDDING]
    for name, found in source.shapes.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in expected:
            raise InputError(
                f"{source.path}: tensor {name} is unknown to a {spec.model_type} model of {spec.num_layers} layers; "
                "check config.json against the weights"
            )
        if tuple(found) != expected[name]:
            raise InputError(
                f"{source.path}: tensor {name} has shape {list(found)}, expected {list(expected[name])}; "
                "check config.json against the weights"
            )


def check_tied_head(source: TensorSource, spec: ModelSpec, parts: Iterable[Part] | None = None) -> None:
    """Refuses a tied model with a head that differs from its embeddings: leaving it out would change the model.

    Args:
        source: the checkpoint.
        spec: its model.
        parts: the parts of the embedding to compare; None: all of it.

    Raises:
        InputError: they differ.
    """
    if not spec.tie_word_embeddings or HEAD not in source.shapes:
        return
    shape = source.shapes[EMBEDDING]
    row_bytes = shape[1] * DTYPES[source.dtypes[EMBEDDING]].itemsize
    for part in [whole(shape)] if parts is None else parts:
        for block in row_blocks(part, row_bytes):
            if not np.array_equal(source.read_part(HEAD, block), source.read_part(EMBEDDING, block), equal_nan=True):
                raise InputError(
                    f"{source.path}: config.json ties the embeddings, but {HEAD} differs from {EMBEDDING}; "
                    "set tie_word_embeddings to false or remove that tensor"
                )


def cast(source: TensorSource, dtype: str) -> TensorSource:
    """The same checkpoint in another dtype, converted tensor by tensor as it is read.

    Raises:
        InputError: an unknown dtype; on reading, a number too large for float16.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}")

    def read_part(name: str, part: Part) -> np.ndarray:
        tensor = source.read_part(name, part)
        if dtype == "float16" and source.dtypes[name] != dtype and (np.abs(tensor) > _FLOAT16_MAX).any():
            raise InputError(
                f"{source.path}: tensor {name} exceeds float16's {_FLOAT16_MAX:g}; choose bfloat16 or float32"
            )
        return tensor.astype(DTYPES[dtype], copy=False)

    return dataclasses.replace(source, dtypes=dict.fromkeys(source.dtypes, dtype), read_part=read_part)


def _layer_name(name: str) -> str:
    if name.endswith("_bias"):
        return _MODULES[name.removesuffix("_bias")] + ".bias"
    return _MODULES[name] + ".weight"
