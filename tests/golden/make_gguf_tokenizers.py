"""Writes gguf_tokenizers.json: small vocabularies as GGUF metadata, and the ids that transformers gives with them.

Run with torch and sentencepiece installed: python tests/golden/make_gguf_tokenizers.py
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "weights")]
from test_gguf_tokenizer import write_tokenizer  # noqa: E402

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def byte_level(texts: list[str], special: list[str], pre: str | None, **extra: Any) -> dict[str, Any]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=sorted(alphabet), show_progress=False)
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # llama.cpp writes user-defined tokens as plain text, the run of spaces too.
    user_defined = ["<think>", "</think>", "      "]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens + special + user_defined,
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens) + [CONTROL] * len(special) + [USER_DEFINED] * 3,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    return metadata | ({} if pre is None else {"tokenizer.ggml.pre": pre}) | extra


def sentencepiece_bpe(texts: list[str], **extra: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.txt")
        corpus.write_text("\n".join(text.replace("\0", "") for text in texts), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(Path(folder, "model")),
            model_type="bpe",
            vocab_size=420,
            byte_fallback=True,
            character_coverage=0.98,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["<think>"],
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder, "model.model")))
    ids = range(len(model))
    types = [UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else NORMAL for i in ids]
    types = [BYTE if model.is_byte(i) else types[i] for i in ids]
    types = [USER_DEFINED if model.id_to_piece(i) == "<think>" else types[i] for i in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        **extra,
    }


def main() -> None:
    texts = json.loads((HERE / "gguf_texts.json").read_text(encoding="utf-8"))
    chat = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    llama3 = ["<|begin_of_text|>", "<|eot_id|>", "<|im_start|>"]
    cases = {
        "gpt2": ("llama", byte_level(texts, chat, "gpt-2")),
        "smollm": ("llama", byte_level(texts, chat, "smollm", **{"tokenizer.ggml.add_bos_token": False})),
        "no_pre": ("llama", byte_level(texts, chat, None, **{"tokenizer.ggml.add_bos_token": True})),
        "llama3": ("llama", byte_level(texts, llama3, "llama-bpe", **{"tokenizer.ggml.add_bos_token": True})),
        "qwen2": ("qwen2", byte_level(texts, chat, "qwen2", **{"tokenizer.ggml.add_bos_token": False})),
        "qwen3": ("qwen3", byte_level(texts, chat, "qwen2", **{"tokenizer.ggml.padding_token_id": 330})),
        "llama2": ("llama", sentencepiece_bpe(texts)),
        "llama2_no_bos": ("llama", sentencepiece_bpe(texts, **{"tokenizer.ggml.add_bos_token": False})),
        "llama2_eos": ("llama", sentencepiece_bpe(texts, **{"tokenizer.ggml.add_eos_token": True})),
    }
    golden = {}
    for name, (architecture, metadata) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder, "model.gguf"), architecture, metadata)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        ids = [tokenizer(text).input_ids for text in texts]
        golden[name] = {"architecture": architecture, "metadata": metadata, "ids": ids}
    (HERE / "gguf_tokenizers.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
