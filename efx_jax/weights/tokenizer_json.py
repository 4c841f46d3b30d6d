"""The tokenizer of a checkpoint folder, as its `tokenizer.json` defines it."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from efx_jax.errors import InputError, first_line
from efx_jax.weights.config_json import read_json

# Options of a byte-level step that only affect a token's offsets in the text, and those that a decoder ignores.
_OFFSETS = ("trim_offsets",)
_IDLE_IN_DECODERS = ("trim_offsets", "add_prefix_space", "use_regex")
# Where SentencePiece tokenizers differ: the space before a text, several spaces, ligatures, digits.
_PROBES = ("a", "a  a", "\ufb01", "10 2026")
_SPACE = "▁"
_WITHOUT_SPACE = {"add_prefix_space": False}


def folder_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; needs `transformers`, runs no code from the checkpoint.

    `AutoTokenizer` rebuilds some classes from vocabulary and merges alone: SmolLM2's, declared a GPT2Tokenizer, then no
    longer splits texts at digits, and a LlamaTokenizer puts a space before every text, whether its file does or not.
    If this loses a step or the `ignore_merges` of a byte-level `tokenizer.json`, or splits some texts differently from
    the `tokenizer.json` of a SentencePiece tokenizer (LLaMA 2), the file itself is used. With `"legacy": false` in
    `tokenizer_config.json` the owner declares that no space is put after a special token, nor before a text that
    begins with one, which is how transformers 5 builds the class: for these spaces the file is ignored. For a
    `tokenizer.model` without a `tokenizer.json`, only the space before a text is checked.

    Args:
        folder: the folder with the tokenizer's files.

    Returns:
        A transformers fast tokenizer.

    Raises:
        InputError: there is no tokenizer, or transformers cannot load it.
    """
    file = folder / "tokenizer.json"
    try:
        tokenizer, is_whole = _as_declared(folder)
        return tokenizer if is_whole else _from_file(folder, tokenizer)
    # The tokenizers library raises nothing more specific, whatever is wrong with a file.
    except Exception as error:
        advice = "download tokenizer.json again, or update transformers and tokenizers"
        raise InputError(
            f"{folder}: has no tokenizer that transformers can load ({first_line(error)}); "
            f"{advice if file.is_file() else 'add tokenizer.json'}"
        ) from error


def declare_tokenizer(src: Path, dst: Path) -> None:
    """Changes a copied tokenizer's declaration, if needed, so that `AutoTokenizer` reads it as the files define it.

    An opened export then gives the ids that it was trained on, except for qwen2 models, for which transformers 5
    ignores the declaration and builds its Qwen2Tokenizer; a warning says so if that is a different tokenizer. If
    transformers is not installed, or cannot load the tokenizer, the copy stays as it is.

    Args:
        src: the folder that it was copied from.
        dst: the folder of the copy.
    """
    config = dst / "tokenizer_config.json"
    has_file = (dst / "tokenizer.json").is_file()
    if not has_file and not config.is_file():
        return
    # transformers would recommend installing torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        tokenizer, is_whole = _as_declared(src)
        if is_whole:
            return
        written = _from_file(src, tokenizer)
    # The tokenizers library raises nothing more specific, whatever is wrong with a file.
    except Exception:
        return
    found = read_json(config) if config.is_file() else {}
    way = {"tokenizer_class": "PreTrainedTokenizerFast"} if has_file else _WITHOUT_SPACE
    declared = written.special_tokens_map | found | way
    config.write_text(json.dumps(declared, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # Without a config.json (an Orbax folder has none yet) nothing tells transformers which class to build instead.
    if (dst / "config.json").is_file() and not _as_declared(dst)[1]:
        warnings.warn(
            f"{src}: AutoTokenizer of transformers builds another tokenizer than tokenizer.json has, and so it does of "
            "the export; open that with transformers.PreTrainedTokenizerFast.from_pretrained",
            stacklevel=2,
        )


def _as_declared(folder: Path) -> tuple[Any, bool]:
    """The tokenizer that `AutoTokenizer` builds, and whether it splits texts as the folder's files say."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return tokenizer, type(tokenizer) is transformers.PreTrainedTokenizerFast or _follows(tokenizer, folder)


def _follows(tokenizer: Any, folder: Path) -> bool:
    """Whether a tokenizer built from a folder's vocabulary splits texts as the folder's files say."""
    from tokenizers import Tokenizer

    backend, file = getattr(tokenizer, "backend_tokenizer", None), folder / "tokenizer.json"
    if backend is None:
        return True
    if not file.is_file():
        return not _gains_space(tokenizer, folder / "tokenizer.model")
    written = read_json(file)
    if written["model"].get("byte_fallback"):
        probes = _PROBES if _has_no_legacy(folder) else (*_PROBES, " a", "  a", f"{tokenizer.eos_token}a")
        return _cuts_alike(tokenizer, _from_file(folder, tokenizer), probes)
    # Without its vocabulary a file loads instantly; the library fills in what an old file leaves out.
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    bare = Tokenizer.from_str(json.dumps(written | {"model": empty, "added_tokens": [], "post_processor": None}))
    takes_whole = getattr(backend.model, "ignore_merges", False) == bool(written["model"].get("ignore_merges"))
    return takes_whole and _steps(backend) == _steps(bare)


def _has_no_legacy(folder: Path) -> bool:
    """Whether the folder's owner has chosen transformers 5's rule for spaces, see `folder_tokenizer`."""
    config = folder / "tokenizer_config.json"
    return config.is_file() and read_json(config).get("legacy") is False


def _cuts_alike(tokenizer: Any, written: Any, texts: tuple[str, ...]) -> bool:
    """Whether two tokenizers give the same ids for some texts.

    Some old files find no special token in a text, which then says nothing about the spaces; such a text is skipped.
    """
    eos = tokenizer.eos_token_id
    both = [[encoder(text, add_special_tokens=False).input_ids for text in texts] for encoder in (tokenizer, written)]
    return all(a == b for a, b in zip(*both, strict=True) if (eos in a) == (eos in b))


def _gains_space(tokenizer: Any, model: Path) -> bool:
    """Whether a tokenizer puts a space before a text although the SentencePiece model it was built from does not."""
    if not model.is_file() or not "".join(tokenizer.tokenize("a")).startswith(_SPACE):
        return False
    from sentencepiece import SentencePieceProcessor

    return not SentencePieceProcessor(model_file=str(model)).encode_as_pieces("a")[0].startswith(_SPACE)


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
    """The file's tokenizer, with the special tokens of `tokenizer` added if its vocabulary has them."""
    import transformers

    if not (folder / "tokenizer.json").is_file():
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **_WITHOUT_SPACE)
    written = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    vocab = written.get_vocab()
    for name, token in tokenizer.special_tokens_map.items():
        if getattr(written, name, None) is None and token in vocab:
            setattr(written, name, token)
    return written
