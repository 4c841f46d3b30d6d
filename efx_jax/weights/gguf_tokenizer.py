"""Builds a Hugging Face tokenizer from the metadata of a GGUF file, without torch.

It gives the token ids of `AutoTokenizer.from_pretrained(folder, gguf_file=...)` in transformers 5, even where that
is less precise than the tokenizer the model was trained with:

- smollm: the original first splits a text at every digit, so the two newlines before a list's "1." are one token. Here,
  as in transformers, the last space or newline before a digit stands alone. Digits themselves agree.
- qwen2: the original composes accents (NFC); the conversion does not, but a saved folder opened as a qwen2 model does.
- llama-bpe: without an add_bos_token key in the file no bos is added.

It differs where the conversion would leave the vocabulary: transformers adds a `<|endoftext|>` beyond the embedding to
a vocabulary that lacks it, and splits control tokens outside the byte alphabet (`<｜User｜>` of DeepSeek) into bytes.
It also differs where the conversion misses part of the vocabulary: a few hundred tokens of LLaMA 3 that no merges
produce are kept whole here, as in the original and in llama.cpp (github.com/ggml-org/llama.cpp/pull/7193).
The split patterns are those of the models' own `tokenizer.json` files, as llama.cpp (`src/llama-vocab.cpp`) names them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efx_jax.errors import InputError
from efx_jax.weights.config_json import read_json
from efx_jax.weights.gguf_file import GGUFFile, read_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# None: GPT-2's own pattern, which the byte-level pre-tokenizer has built in.
_SPLITS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": LLAMA3_SPLIT,
    "llama3": LLAMA3_SPLIT,
    "llama-v3": LLAMA3_SPLIT,
    "falcon3": LLAMA3_SPLIT,
    "smaug-bpe": LLAMA3_SPLIT,
    "qwen2": QWEN2_SPLIT,
    "deepseek-r1-qwen": QWEN2_SPLIT,
}
# A piece of text that is a token becomes that token, whatever the merges would give.
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3")
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# Tokens of these names are special if the vocabulary has them, whatever type the file gives them.
_ALWAYS_SPECIAL = {"gpt2": ("<|endoftext|>",), "llama": ("<unk>", "<s>", "</s>")}


def gguf_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer that a GGUF file describes.

    Args:
        path: a GGUF file whose `tokenizer.ggml.model` is gpt2 (byte-level BPE) or llama (SentencePiece BPE).

    Returns:
        A tokenizer with the file's special tokens, bos and eos flags and chat template; `save_pretrained` writes a
        folder with which `AutoTokenizer.from_pretrained` gives the same ids.

    Raises:
        InputError: no tokenizer in the file, an unsupported kind or pre-tokenizer, or inconsistent lists.
    """
    from transformers import PreTrainedTokenizerFast

    file = read_header(path)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{file.path}: tokenizer.ggml.model {kind!r} is not supported; expected gpt2 or llama")
    tokens = _per_token(file, "tokens")
    backend = _byte_level_backend(file, tokens) if kind == "gpt2" else _sentencepiece_backend(file, tokens)
    _add_tokens(backend, file, tokens, kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        # By default a SentencePiece file adds a bos and a byte-level one does not (as in transformers).
        add_bos_token=file.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"),
        add_eos_token=file.metadata.get("tokenizer.ggml.add_eos_token", False),
        **_special_tokens(file, tokens),
    )


def save_gguf_tokenizer(path: str | Path, folder: Path) -> None:
    """Writes the tokenizer of a GGUF file into a folder, under a class that transformers 4 and 5 know.

    Raises:
        InputError: see `gguf_tokenizer`.
    """
    gguf_tokenizer(path).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    # transformers 4, on which much of vLLM depends, knows neither the class's new name nor this key.
    config.pop("backend", None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _byte_level_backend(file: GGUFFile, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise InputError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not supported; expected one of {', '.join(_SPLITS)}; "
            "use the safetensors checkpoint with its tokenizer.json"
        )
    vocab = {token: index for index, token in enumerate(_spelled(tokens, _token_types(file, tokens)))}
    merges = _stored_merges(file, vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _IGNORE_MERGES))
    split = _SPLITS[pre]
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(file: GGUFFile, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in file.metadata:
        merges = _stored_merges(file, vocab)
    else:
        merges = _merges_from_scores(vocab, dict(zip(tokens, _per_token(file, "scores"), strict=True)))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    has_prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    scheme = "first" if has_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if has_prefix else steps)
    return backend


def _per_token(file: GGUFFile, name: str) -> list[Any]:
    """`tokenizer.ggml.<name>`, a list with one entry per token."""
    values = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not values:
        raise InputError(f"{file.path}: tokenizer.ggml.{name} is missing; the file has no complete tokenizer")
    expected = len(file.metadata["tokenizer.ggml.tokens"])
    if len(values) != expected:
        raise InputError(f"{file.path}: tokenizer.ggml.{name} has {len(values)} entries, expected {expected}")
    return values


def _stored_merges(file: GGUFFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in file.metadata.get("tokenizer.ggml.merges", []):
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise InputError(
                f"{file.path}: tokenizer.ggml.merges has {merge!r}, which does not join two tokens to a third"
            )
        merges.append((left, right))
    if not merges:
        raise InputError(f"{file.path}: tokenizer.ggml.merges is missing; the file has no complete tokenizer")
    return merges


def _merges_from_scores(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to split a token into two tokens, best score first: the order in which SentencePiece merges them."""
    ranked = []
    for token, score in scores.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        ranked += [((score, len(left), len(right)), (left, right)) for left, right in pairs]
    ranked.sort(key=lambda entry: entry[0], reverse=True)
    return [pair for _, pair in ranked]


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: the byte itself if it is printable, else the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _spelled(tokens: list[str], types: list[int]) -> list[str]:
    """Tokens in the byte alphabet; llama.cpp writes added tokens, a run of spaces for example, as plain text.

    Control tokens are never spelled in bytes, so they keep their names.
    """
    alphabet = _byte_alphabet()
    known = set(alphabet)
    return [
        token
        if token_type == _CONTROL or known.issuperset(token)
        else "".join(alphabet[byte] for byte in token.encode("utf-8"))
        for token, token_type in zip(tokens, types, strict=True)
    ]


def _token_types(file: GGUFFile, tokens: list[str]) -> list[int]:
    return _per_token(file, "token_type") if "tokenizer.ggml.token_type" in file.metadata else [0] * len(tokens)


def _add_tokens(backend: "Tokenizer", file: GGUFFile, tokens: list[str], kind: str) -> None:
    """Adds the tokens that are matched whole in a text: special ones, and user-defined ones (which decode as text)."""
    from tokenizers import AddedToken

    typed = list(zip(tokens, _token_types(file, tokens), strict=True))
    special = [token for token, token_type in typed if token_type == _CONTROL]
    special += [*_ALWAYS_SPECIAL[kind], *_special_tokens(file, tokens).values()]
    user_defined = [token for token, token_type in typed if token_type == _USER_DEFINED]
    # A respelled token is not in the vocabulary under its own name: adding it would enlarge the vocabulary.
    vocab = backend.get_vocab(with_added_tokens=False)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special if name in vocab])
    backend.add_tokens([AddedToken(name, normalized=False, special=False) for name in user_defined if name in vocab])


def _special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, if the file gives their ids."""
    named = {name: file.metadata[key] for name, key in _SPECIAL_IDS.items() if key in file.metadata}
    for name, index in named.items():
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise InputError(f"{file.path}: {_SPECIAL_IDS[name]} is {index!r}, but there are {len(tokens)} tokens")
    return {name: tokens[index] for name, index in named.items()}
