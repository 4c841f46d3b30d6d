"""Converts whole checkpoints from one format to another: Hugging Face or GGUF to Orbax, and back."""

import os
from pathlib import Path

import jax

from efx_jax.files import atomic_folder
from efx_jax.model.spec import spec_from_config
from efx_jax.weights.assemble import assemble, tree_bytes
from efx_jax.weights.hf import MAX_SHARD_BYTES, open_checkpoint, write_extras, write_folder
from efx_jax.weights.orbax import write_orbax
from efx_jax.weights.source import cast, leaves


def import_checkpoint(src: str | os.PathLike[str], dst: str | os.PathLike[str], dtype: str | None = None) -> None:
    """Converts a Hugging Face folder or a GGUF file to an Orbax folder.

    Args:
        src: whatever `load_pretrained` accepts.
        dst: the folder to make.
        dtype: "float32", "bfloat16" or "float16"; None keeps every tensor's own dtype.

    Raises:
        InputError: `src` is damaged or unsupported, `dst` exists, or the disk is full.
    """
    source = open_checkpoint(src)
    spec = spec_from_config(source.config)
    tensors = source if dtype is None else cast(source, dtype)
    with atomic_folder(dst, needs=tree_bytes(tensors, spec)) as partial:
        write_extras(source.path, partial)
        # A conversion needs no accelerator, and the model need not fit one.
        with jax.default_device(_host()):
            params = assemble(tensors, spec, None)
        dtypes = {name: tensors.dtypes[name] for leaf in leaves(spec) for name in leaf.names}
        write_orbax(partial, params, source.config, dtypes)


def export_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Converts an Orbax folder, or a run's export, to a Hugging Face folder.

    Unchanged tensors come out byte for byte as they went in.

    Args:
        src: whatever `load_pretrained` accepts.
        dst: the folder to make.
        dtype: "float32", "bfloat16" or "float16"; None keeps every tensor's own dtype.
        max_shard_bytes: size above which the weights are split into several files; None: 5 GB.

    Raises:
        InputError: `src` is damaged or unsupported, `dst` exists, or the disk is full.
    """
    source = open_checkpoint(src)
    spec = spec_from_config(source.config)
    tensors = source if dtype is None else cast(source, dtype)
    write_folder(dst, tensors, spec, source.config, Path(source.path), max_shard_bytes or MAX_SHARD_BYTES)


def _host() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        # JAX_PLATFORMS excludes the CPU.
        return jax.local_devices()[0]
