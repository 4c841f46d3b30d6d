"""Where tensors come from, and how Hugging Face's names map to the parameter tree."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec, config_from_spec, param_shapes

DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

_FLOAT16_MAX = 65504.0

# Tree name -> Hugging Face name; {} stands for the layer.
_TOP = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}
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
    """A checkpoint, read one tensor at a time, whatever its format.

    Attributes:
        path: the folder or file, for messages and for the tokenizer beside the weights.
        config: raw JSON of its `config.json` (made from the metadata where the format has none).
        shapes: Hugging Face tensor name -> shape, in Hugging Face's layout (`[O, I]`, nothing permuted).
        dtypes: Hugging Face tensor name -> "float32", "bfloat16" or "float16": the dtype that `read` returns.
        read: Hugging Face tensor name -> array.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree: its path there and its tensors, one per layer where it is stacked."""

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


def check_names_and_shapes(source: TensorSource, spec: ModelSpec) -> None:
    """Refuses a checkpoint whose tensors are not exactly the spec's; reads no tensor.

    Old checkpoints' rotary buffers are ignored, and a tied model may also hold its `lm_head.weight`.

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
        expected[_TOP["lm_head"]] = expected[_TOP["embed_tokens"]]
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


def assemble(source: TensorSource, spec: ModelSpec, dtype: str | None) -> dict[str, Any]:
    """Reads a checkpoint into the parameter tree of `param_shapes(spec)`.

    Host memory above the tree itself stays within two copies of its largest leaf: tensors are read one by one into
    one leaf at a time.

    Args:
        source: the checkpoint.
        spec: its model.
        dtype: "float32", "bfloat16", "float16", or None to keep each leaf's own (a leaf whose layers differ becomes
            float32, which holds all of them exactly).

    Returns:
        The tree, jax arrays.

    Raises:
        InputError: a missing, unknown or wrongly shaped tensor, NaN or Inf, a tied head that differs.
    """
    check_names_and_shapes(source, spec)
    _check_tied_head(source, spec)
    tensors = source if dtype is None else cast(source, dtype)
    params: dict[str, Any] = {"layers": {}}
    for leaf in leaves(spec):
        branch = params["layers"] if leaf.stacked else params
        branch[leaf.path[-1]] = jax.block_until_ready(jax.device_put(_read_leaf(tensors, leaf)))
    return params


def cast(source: TensorSource, dtype: str) -> TensorSource:
    """The same checkpoint in another dtype, converted tensor by tensor as it is read.

    Raises:
        InputError: an unknown dtype; on reading, a number too large for it.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}")

    def read(name: str) -> np.ndarray:
        tensor = source.read(name)
        if dtype == "float16" and source.dtypes[name] != dtype and (np.abs(tensor) > _FLOAT16_MAX).any():
            raise InputError(
                f"{source.path}: tensor {name} exceeds float16's {_FLOAT16_MAX:g}; choose bfloat16 or float32"
            )
        return tensor.astype(DTYPES[dtype], copy=False)

    return dataclasses.replace(source, dtypes=dict.fromkeys(source.dtypes, dtype), read=read)


def tree_bytes(source: TensorSource, spec: ModelSpec) -> int:
    """Size of the tree that `assemble(source, spec, None)` gives, in bytes.

    Raises:
        InputError: a missing, unknown or wrongly shaped tensor.
    """
    check_names_and_shapes(source, spec)
    return sum(math.prod(leaf.shape) * DTYPES[_leaf_dtype(source, leaf)].itemsize for leaf in leaves(spec))


def read_finite(source: TensorSource, name: str) -> np.ndarray:
    """Reads one tensor and refuses NaN and Inf.

    Raises:
        InputError: the tensor holds NaN or Inf.
    """
    tensor = source.read(name)
    # Row blocks keep the boolean array small beside a large embedding.
    for start in range(0, len(tensor), 4096):
        finite = np.isfinite(tensor[start : start + 4096])
        if not finite.all():
            index = [int(i) for i in np.argwhere(~finite)[0]]
            index[0] += start
            raise InputError(
                f"{source.path}: tensor {name} holds {tensor[tuple(index)]} at {index}; expected finite numbers; "
                "get an intact checkpoint"
            )
    return tensor


def params_source(params: Mapping[str, Any], spec: ModelSpec, path: Path) -> TensorSource:
    """A parameter tree (jax or numpy arrays) as a source: `read` brings one layer's tensor to the host.

    Args:
        params: the tree of `param_shapes(spec)`.
        spec: its model.
        path: where the source says that it lies.

    Raises:
        InputError: the tree is not `param_shapes(spec)`, or a leaf has an unsupported dtype.
    """
    arrays: dict[str, tuple[Any, int | None]] = {}
    for leaf in leaves(spec):
        branch = params["layers"] if leaf.stacked else params
        array = branch.get(leaf.path[-1])
        if array is None or tuple(array.shape) != leaf.shape:
            found = "nothing" if array is None else list(array.shape)
            raise InputError(
                f"params: {'.'.join(leaf.path)} is {found}, expected {list(leaf.shape)}; pass the model's spec"
            )
        if str(array.dtype) not in DTYPES:
            raise InputError(f"params: {'.'.join(leaf.path)} is {array.dtype}, expected one of {', '.join(DTYPES)}")
        arrays |= {name: (array, i if leaf.stacked else None) for i, name in enumerate(leaf.names)}

    def read(name: str) -> np.ndarray:
        array, layer = arrays[name]
        return np.asarray(array if layer is None else array[layer])

    shapes = {name: tuple(array.shape if layer is None else array.shape[1:]) for name, (array, layer) in arrays.items()}
    dtypes = {name: str(array.dtype) for name, (array, _) in arrays.items()}
    return TensorSource(path, config_from_spec(spec, "float32"), shapes, dtypes, read)


def _layer_name(name: str) -> str:
    if name.endswith("_bias"):
        return _MODULES[name.removesuffix("_bias")] + ".bias"
    return _MODULES[name] + ".weight"


def _leaf_dtype(source: TensorSource, leaf: Leaf) -> str:
    """The dtype that holds all of a leaf's layers exactly: theirs if they agree, else float32."""
    distinct = {source.dtypes[name] for name in leaf.names}
    return distinct.pop() if len(distinct) == 1 else "float32"


def _read_leaf(source: TensorSource, leaf: Leaf) -> np.ndarray:
    if not leaf.stacked:
        return read_finite(source, leaf.names[0])
    stacked = np.empty(leaf.shape, DTYPES[_leaf_dtype(source, leaf)])
    for layer, name in enumerate(leaf.names):
        stacked[layer] = read_finite(source, name)
    return stacked


def _check_tied_head(source: TensorSource, spec: ModelSpec) -> None:
    head, embedding = _TOP["lm_head"], _TOP["embed_tokens"]
    if not spec.tie_word_embeddings or head not in source.shapes:
        return
    if not np.array_equal(source.read(head), source.read(embedding)):
        raise InputError(
            f"{source.path}: config.json ties the embeddings, but {head} differs from {embedding}; "
            "set tie_word_embeddings to false or remove that tensor"
        )
