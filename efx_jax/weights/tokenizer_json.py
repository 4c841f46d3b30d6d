"""The tokenizer of a checkpoint folder, as its `tokenizer.json` has it."""

import json
import os
from pathlib import Path
from typing import Any

from efx_jax.errors import InputError, first_line
from efx_jax.weights.config_json import read_json

# Of a byte-level step these say where a token lies in the text, and to a decoder nothing at all.
_OFFSETS = ("trim_offsets",)
_IDLE_IN_DECODERS = ("trim_offsets", "add_prefix_space", "use_regex")


def folder_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; needs `transformers`, runs no code of the checkpoint.

    `AutoTokenizer` builds some classes anew from vocabulary and merges alone: SmolLM2's, declared a GPT2Tokenizer, then
    cuts no text at digits any more. Where that has lost a step of a byte-level `tokenizer.json`, the file itself is
    taken. A SentencePiece tokenizer (LLaMA 2) is left as transformers has it, which writes the same steps in another
    way.

    Args:
        folder: with the tokenizer's files.

    Returns:
        A transformers fast tokenizer.

    Raises:
        InputError: there is no tokenizer, or one that transformers cannot load.
    """
    file = folder / "tokenizer.json"
    try:
        tokenizer, is_whole = _as_declared(folder)
        return tokenizer if is_whole else _from_file(folder, tokenizer)
    # The tokenizers library raises nothing more special, whatever is wrong with a file.
    except Exception as error:
        advice = "download tokenizer.json again, or update transformers and tokenizers"
        raise InputError(
            f"{folder}: has no tokenizer that transformers can load ({first_line(error)}); "
            f"{advice if file.is_file() else 'add tokenizer.json'}"
        ) from error


def declare_tokenizer(src: Path, dst: Path) -> None:
    """Declares a copied tokenizer as one that `AutoTokenizer` reads as its `tokenizer.json` has it, if it is not.

    Whoever opens an export then has the ids that it was trained on. Where transformers is not installed, or cannot load
    the tokenizer, the copy stays as it is.

    Args:
        src: the folder that it was copied from.
        dst: the folder of the copy.
    """
    config = dst / "tokenizer_config.json"
    if not config.is_file():
        return
    # It advises to install torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        tokenizer, is_whole = _as_declared(src)
        if is_whole:
            return
        special = _from_file(src, tokenizer).special_tokens_map
    # The tokenizers library raises nothing more special, whatever is wrong with a file.
    except Exception:
        return
    declared = special | read_json(config) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(declared, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _as_declared(folder: Path) -> tuple[Any, bool]:
    """The tokenizer that `AutoTokenizer` builds, and whether it has the steps of the folder's `tokenizer.json`."""
    import transformers

    file = folder / "tokenizer.json"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    is_whole = type(tokenizer) is transformers.PreTrainedTokenizerFast or not file.is_file()
    return tokenizer, is_whole or _follows(tokenizer, file)


def _follows(tokenizer: Any, file: Path) -> bool:
    """Whether a tokenizer has the steps around the model that a byte-level `tokenizer.json` asks for."""
    from tokenizers import Tokenizer

    written = read_json(file)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or written["model"].get("byte_fallback"):
        return True
    # Without its vocabulary a file is read at once; the library fills in what an old file leaves out.
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    bare = Tokenizer.from_str(json.dumps(written | {"model": empty, "added_tokens": [], "post_processor": None}))
    return _steps(backend) == _steps(bare)


def _steps(backend: Any) -> list[Any]:
    parts = (backend.normalizer, _OFFSETS), (backend.pre_tokenizer, _OFFSETS), (backend.decoder, _IDLE_IN_DECODERS)
    return [None if part is None else _without(json.loads(part.__getstate__()), names) for part, names in parts]


def _without(node: Any, names: tuple[str, ...]) -> Any:
    if isinstance(node, list):
        return [_without(entry, names) for entry in node]
    if isinstance(node, dict):
        return {key: _without(value, names) for key, value in node.items() if key not in names}
    return node


def _from_file(folder: Path, tokenizer: Any) -> Any:
    """The tokenizer of the file; its special tokens are those of the class too, where it knows them."""
    import transformers

    written = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    vocab = written.get_vocab()
    for name, token in tokenizer.special_tokens_map.items():
        if getattr(written, name, None) is None and token in vocab:
            setattr(written, name, token)
    return written
