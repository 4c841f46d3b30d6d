"""Hugging Face folders: opened tensor by tensor, loaded into the parameter tree, written whole or not at all."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from efx_jax.errors import InputError
from efx_jax.files import atomic_folder
from efx_jax.model.spec import ModelSpec, refuse_quantised, spec_from_config
from efx_jax.parallel.hosts import meet, together
from efx_jax.weights.assemble import assemble
from efx_jax.weights.config_json import check_tokenizer_fits, config_to_write, copy_extras, read_json
from efx_jax.weights.fetch import local_path, refuse_unsupported
from efx_jax.weights.packed_file import is_packed_folder, open_packed
from efx_jax.weights.params import params_source
from efx_jax.weights.peft_config import CONFIG_FILE
from efx_jax.weights.safetensors_file import Entry, create, fill, read_header, read_part, tensor_bytes
from efx_jax.weights.source import TensorSource, check_names_and_shapes, check_tied_head, leaves
from efx_jax.weights.tokenizer_json import declare_tokenizer, folder_tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


def open_folder(path: str | os.PathLike[str]) -> TensorSource:
    """Opens a Hugging Face folder: `config.json` and `model.safetensors`, whole or in shards; reads no tensor.

    Raises:
        InputError: no such folder, no safetensors in it, quantised tensors, a missing, truncated or garbled file, a
            shard without a tensor that the index lists in it, or a tokenizer with ids beyond the embedding.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a Hugging Face folder with config.json")
    if (folder / CONFIG_FILE).exists() and not (folder / "config.json").exists():
        raise InputError(
            f"{folder}: holds a PEFT adapter, no model; name the adapter's base as model.path, and the adapter by "
            "--lora.adapter (of train.py) or --adapter (of the evaluation)"
        )
    config = read_json(folder / "config.json")
    # Otherwise the tensors' dtypes would be refused below, without the actual reason.
    refuse_quantised(config)
    entries = {name: entry for file in folder_files(folder).values() for name, entry in file.items()}
    check_tokenizer_fits(folder, config)
    shapes = {name: entry.shape for name, entry in entries.items()}
    dtypes = {name: entry.dtype for name, entry in entries.items()}
    return TensorSource(folder, config, shapes, dtypes, lambda name, part: read_part(entries[name], name, part))


def folder_files(folder: Path) -> dict[Path, dict[str, Entry]]:
    """The safetensors files of a Hugging Face folder with the tensors of each, in the order of its header.

    Raises:
        InputError: a file is missing, truncated or garbled, a shard lacks a tensor that the index lists in it, or two
            shards hold the same tensor.
    """
    promised = _promised_files(folder)
    files = {file: read_header(file) for file in sorted(set(promised.values()))}
    for name, file in promised.items():
        if name and name not in files[file]:
            raise InputError(f"{file}: tensor {name} is missing, though {INDEX} lists it here; download it again")
    holders: dict[str, Path] = {}
    for file, tensors in files.items():
        for name in tensors:
            if name in holders:
                raise InputError(
                    f"{file}: tensor {name} is in {holders[name].name} too; expected it once; download both again"
                )
            holders[name] = file
    return files


def open_checkpoint(path: str | os.PathLike[str]) -> TensorSource:
    """Opens whatever `load_pretrained` accepts; reads no tensor.

    Raises:
        InputError: what the path holds is missing, damaged or unsupported.
    """
    refuse_unsupported(path)
    place = local_path(path)
    if place.suffix == ".gguf":
        from efx_jax.weights.gguf import open_gguf

        return open_gguf(place)
    from efx_jax.weights.orbax import is_orbax_folder, open_orbax

    if is_packed_folder(place):
        return open_packed(place)
    return open_orbax(place) if is_orbax_folder(place) else open_folder(place)


def open_model(path: str | os.PathLike[str]) -> tuple[TensorSource, ModelSpec]:
    """Opens what `load_pretrained` accepts and checks that it is one whole model; reads at most a tied head.

    Raises:
        InputError: what the path holds is missing, damaged or unsupported, or a head differs from tied embeddings.
    """
    source = open_checkpoint(path)
    spec = spec_from_config(source.config)
    check_names_and_shapes(source, spec)
    check_tied_head(source, spec)
    return source, spec


def load_pretrained(
    path: str | os.PathLike[str], dtype: str | None = "float32", mesh: Mesh | None = None
) -> tuple[dict[str, Any], ModelSpec]:
    """Loads a checkpoint into the parameter tree, whole on one device or in shards on a mesh.

    On a mesh of several processes all of them must call this. Each reads only what its devices hold (more for an Orbax
    folder or quantised rows, dropping the rest). An error in one process is raised in all.

    Args:
        path: Hugging Face folder, .gguf file, Orbax folder of `convert_weights.py import`, packed folder of
            `convert_weights.py pack`, run folder (its export), Hub name, or "quickstart".
        dtype: "float32", "bfloat16", "float16", or None to keep the checkpoint's own dtypes.
        mesh: `data` x `fsdp` x `tensor`, see `parallel.mesh.make_mesh`; None: the default device.

    Returns:
        The tree of `param_shapes(spec)` (jax arrays), and the spec.

    Raises:
        InputError: what the path holds is missing, damaged, unsupported or not finite, or the mesh does not divide it.
    """
    with together() if mesh is not None and mesh.is_multi_process else contextlib.nullcontext():
        source = open_checkpoint(path)
        spec = spec_from_config(source.config)
        return assemble(source, spec, dtype, mesh), spec


def save_pretrained(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    spec: ModelSpec,
    source: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens.

    Sharded parameters are never gathered. If several processes hold them, all must call this with a path on a disk
    that they share, and each writes what its devices hold. An error in one process is raised in all.

    Args:
        path: the folder to make.
        params: the tree of `param_shapes(spec)`; every leaf is written in its own dtype.
        spec: the model.
        source: checkpoint whose `config.json` is carried over and whose tokenizer and extras are copied.
        max_shard_bytes: size above which the weights are split into several files.

    Raises:
        InputError: `path` exists, the disk is full, `params` do not fit `spec`, or `source` is another model.
    """
    extras = None if source is None else local_path(source)
    original = read_json(extras / "config.json") if extras is not None and extras.is_dir() else None
    tensors = params_source(params, spec, Path(path))
    write_folder(path, tensors, spec, original, extras, max_shard_bytes)


def write_folder(
    path: str | os.PathLike[str],
    source: TensorSource,
    spec: ModelSpec,
    original: Mapping[str, Any] | None,
    extras: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a Hugging Face folder from any source, with one block of rows in memory at a time.

    Args:
        path: the folder to make.
        source: the tensors; the head of a tied model is left out.
        spec: the model.
        original: raw `config.json` to carry over, or None.
        extras: folder or .gguf file that the tokenizer comes from, or None.
        max_shard_bytes: size above which the weights are split into several files.
        metadata: tensor name -> its entry in the metadata of its file.
        finish: called by the first process with the complete folder, before it gets its final name.

    Raises:
        InputError: `path` exists, the disk is full, or the tensors, `original` and `spec` disagree.
    """
    check_names_and_shapes(source, spec)
    check_tied_head(source, spec)
    names = [name for leaf in leaves(spec) for name in leaf.names]
    config = config_to_write(spec, _main_dtype(source, names), original)
    needs = sum(tensor_bytes(source, name) for name in names)
    files = _split(source, names, max_shard_bytes)
    leads = not source.shared or jax.process_index() == 0
    with atomic_folder(path, needs=needs, shared=source.shared) as partial:
        if leads:
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if extras is not None:
                write_extras(extras, partial)
            _create_files(partial, source, files, metadata or {})
        if source.shared:
            meet()
        for file in files:
            fill(partial / file, source)
        if finish is not None:
            if source.shared:
                meet()
            if leads:
                finish(partial)


def write_extras(extras: Path, folder: Path) -> None:
    """Writes the tokenizer and the small files of a checkpoint (folder or .gguf file) into a folder."""
    if extras.is_dir():
        copy_extras(extras, folder)
        declare_tokenizer(extras, folder)
        return
    from efx_jax.weights.gguf_tokenizer import save_gguf_tokenizer

    save_gguf_tokenizer(extras, folder)


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Loads the tokenizer of a checkpoint; needs `transformers`, runs no code from the checkpoint.

    Args:
        path: whatever `load_pretrained` accepts.

    Returns:
        A transformers fast tokenizer.

    Raises:
        InputError: there is no tokenizer, it cannot be loaded, or `transformers` is not installed.
    """
    # transformers would recommend installing torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError("tokenizers need the package transformers; pip install transformers") from error
    place = local_path(path)
    if place.suffix == ".gguf":
        from efx_jax.weights.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(place)
    return folder_tokenizer(place)


def _promised_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file by the index, after checking that each file exists; without an index: "" -> the only file."""
    if (folder / SINGLE).is_file():
        return {"": folder / SINGLE}
    if not (folder / INDEX).is_file():
        pickles = sorted(folder.glob("pytorch_model*.bin"))
        if pickles:
            raise InputError(
                f"{pickles[0]}: is a pickle, which can run code when it is opened; expected {SINGLE}; "
                "get the checkpoint's safetensors version"
            )
        raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}; expected a Hugging Face folder with safetensors")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputError(f"{folder / INDEX}: has no weight_map; download the file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise InputError(
                f"{folder / INDEX}: weight_map {name}: expected the name of a file in this folder, found {shard!r}; "
                "download the file again"
            )
    files = {name: folder / shard for name, shard in weight_map.items()}
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise InputError(f"{file}: shard is missing, though {INDEX} lists it; download the file")
    return files


def _main_dtype(source: TensorSource, names: list[str]) -> str:
    """The dtype of most bytes, which `config.json` also states for checkpoints with a few float32 norms."""
    sizes: Counter[str] = Counter()
    for name in names:
        sizes[source.dtypes[name]] += tensor_bytes(source, name)
    return sizes.most_common(1)[0][0]


def _split(source: TensorSource, names: list[str], max_bytes: int) -> dict[str, list[str]]:
    """Safetensors file name -> names of its tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = tensor_bytes(source, name)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def _create_files(
    folder: Path, source: TensorSource, files: Mapping[str, list[str]], metadata: Mapping[str, str]
) -> None:
    """Creates the files at full size, and an index if there are several; the tensors are filled in later."""
    for file, names in files.items():
        create(folder / file, source, names, {name: metadata[name] for name in names if name in metadata})
    if len(files) == 1:
        return
    weight_map = {name: file for file, names in files.items() for name in names}
    total = sum(tensor_bytes(source, name) for name in weight_map)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
