"""Writes gguf_smollm2.json: what transformers makes of the SmolLM2 GGUF file, for tests without torch.

Run with torch installed: EFX_SMOLLM2_GGUF=FILE python tests/golden/make_gguf_smollm2.py
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

HERE = Path(__file__).parent
CONFIG = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
CONFIG += ("head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id")


def main() -> None:
    path = Path(os.environ["EFX_SMOLLM2_GGUF"])
    config = load_gguf_checkpoint(path)["config"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    texts = json.loads((HERE / "gguf_texts.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    golden = {
        "sha256": digest.hexdigest(),
        "config": {name: config[name] for name in CONFIG},
        "ids": [tokenizer(text).input_ids for text in texts],
    }
    (HERE / "gguf_smollm2.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
