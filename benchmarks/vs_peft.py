"""This program beside transformers + peft (torch) on the same CPU, weights, batch, adapters and threads, in one run.

    python benchmarks/vs_peft.py [--model DIR] [--repeats 7] [--only step ...] [--out docs/results/speed.json]

Without `--model`, random weights of SmolLM2-135M's shape; they are written once as bfloat16 by `save_pretrained` and
read by `AutoModelForCausalLM`, so that both sides hold the same arrays. Adapters: r 8, alpha 16, all seven linears,
float32 as peft makes them (`autocast_adapter_dtype`), AdamW after norm clipping on both sides, loss on all tokens. All
matmul operands are bfloat16. Both sides are tried in the ways below and the faster median stands for each:

- torch, attention by `sdpa`, no gradient checkpointing: float32 weights under `torch.autocast(bfloat16)`, or bfloat16
  weights without it (with it a step takes 10 times as long). bfloat16 adapters, which peft makes only on request, are
  faster still and are reported as `step_peft_bf16_adapters`; their AdamW loses updates below 1/256 of a weight.
- this program: every `remat`, weights stored as `--dtype`.

Repetitions alternate between all rivals; each row has the median and its spread. `ratio` is time over time; rows of
`generate` are tokens per second, and their ratio is again our time over theirs.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rows import interleaved, keep, median, row, spread

from efx_jax.config import MaskForward, Remat
from efx_jax.data.tokens import Tokenized
from efx_jax.evaluation.perplexity import perplexity
from efx_jax.lora import init_lora
from efx_jax.masks import pack_mask
from efx_jax.model.generate import generate
from efx_jax.model.spec import LINEARS, ModelSpec, init_params, spec_from_config
from efx_jax.training.state import init_train_state
from efx_jax.training.step import StepOptions, train_step
from efx_jax.weights.hf import load_pretrained, save_pretrained

SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
RANK, ALPHA, LEARNING_RATE, WEIGHT_DECAY, CLIP = 8, 16, 1e-4, 0.01, 1.0
# Two bfloat16 forward passes of one function, summed in different orders, differ by less than this (nats per token).
LOSS_TOLERANCE = 0.02


def main() -> None:
    arguments = parse()
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "jax": jax.__version__}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or write_random(Path(scratch) / "model", arguments.config)
        params, spec = load_pretrained(folder, dtype=arguments.dtype)
        tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (arguments.windows, arguments.length), np.int32)
        parts = {"step": steps, "generation": generation, "perplexity": perplexities}
        for name in arguments.only:
            keep(arguments.out, parts[name](folder, params, spec, tokens, arguments))


def steps(
    folder: Any, params: Any, spec: ModelSpec, tokens: Any, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one update: peft, ours plain, ours under a 50 % mask in each mode."""
    tokens = tokens[: arguments.batch]
    rivals: dict[str, Callable[[], float]] = {
        "peft float32 weights, autocast": peft_step(folder, tokens, "float32", True, True),
        "peft bfloat16 weights": peft_step(folder, tokens, "bfloat16", False, True),
        "peft bfloat16 adapters": peft_step(folder, tokens, "bfloat16", False, False),
    }
    modes: tuple[MaskForward, ...] = ("exact", "ste", "frozen")
    for remat in arguments.remat:
        rivals[f"plain, remat {remat}"] = our_step(params, spec, tokens, "dense", remat)
        for mode in modes:
            rivals[f"{mode}, remat {remat}"] = our_step(params, spec, tokens, mode, remat)
    first_losses = {name: run() for name, run in rivals.items()}
    seconds = interleaved(rivals, arguments.repeats)
    agree("plain", first_losses[f"plain, remat {arguments.remat[0]}"], first_losses["peft float32 weights, autocast"])

    def best(prefix: str) -> str:
        return min((name for name in seconds if name.startswith(prefix)), key=lambda name: median(seconds[name]))

    def measured(name: str, of: str, ratio: float | None, against: str) -> dict[str, Any]:
        details = {"variant": of, "first_loss": round(first_losses[of], 4), **spread(seconds[of])}
        return row(name, median(seconds[of]), "seconds", ratio, against, **details)

    low = "peft bfloat16 adapters"
    low_seconds = seconds.pop(low)
    rival, plain = best("peft"), best("plain")
    peft_time, plain_time = median(seconds[rival]), median(seconds[plain])
    rows = [measured("step_peft", rival, None, ""), measured("step_plain", plain, plain_time / peft_time, "step_peft")]
    for mode in modes:
        name = best(mode)
        rows.append(measured(f"step_{mode}", name, median(seconds[name]) / plain_time, "step_plain"))
    seconds[low] = low_seconds
    ratio = median(low_seconds) / peft_time
    return [*rows, measured("step_peft_bf16_adapters", low, ratio, "step_peft")]


def our_step(params: Any, spec: ModelSpec, tokens: Any, mode: MaskForward, remat: Remat) -> Callable[[], float]:
    """A function that runs one update and returns its loss; `dense` runs without masks."""
    adapters = init_lora(jax.random.key(1), params, spec, rank=RANK, alpha=ALPHA)
    masks = None if mode == "dense" else half_masks(params)
    batch = {
        "tokens": jnp.asarray(tokens),
        "targets": jnp.asarray(np.roll(tokens, -1, axis=1)),
        "weights": jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0),
        "lengths": jnp.full(len(tokens), tokens.shape[1], jnp.int32),
    }
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))
    options = StepOptions(mask_forward=mode, compute_dtype="bfloat16", remat=remat)
    state = init_train_state(adapters, tx)

    def run() -> float:
        nonlocal state
        state, metrics = train_step(state, params, masks, batch, jax.random.key(2), spec, tx, options)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run


def half_masks(params: Any) -> dict[str, jax.Array]:
    """Random masks that keep half of every linear, packed."""
    keys = zip(LINEARS, jax.random.split(jax.random.key(3), len(LINEARS)), strict=True)
    return {name: pack_mask(jax.random.bernoulli(key, 0.5, params["layers"][name].shape)) for name, key in keys}


def peft_step(folder: Any, tokens: Any, dtype: str, autocast: bool, float32_adapters: bool) -> Callable[[], float]:
    """The same update by transformers + peft."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS))
    model = get_peft_model(torch_model(folder, dtype), config, autocast_adapter_dtype=float32_adapters)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    ids = torch.tensor(tokens.astype(np.int64))

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def generation(
    folder: Any, params: Any, spec: ModelSpec, tokens: Any, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of greedy decoding: prompts of equal length, after which both sides must choose the same tokens."""
    import torch

    prompts, new = tokens[: arguments.prompts, : arguments.prompt_length], arguments.new_tokens
    lengths = jnp.full(len(prompts), prompts.shape[1], jnp.int32)
    ids = torch.tensor(prompts.astype(np.int64))

    def ours() -> Any:
        chosen = generate(params, jnp.asarray(prompts), lengths, spec, new, compute_dtype="bfloat16")
        return np.asarray(jax.block_until_ready(chosen))

    def theirs(model: Any, autocast: bool) -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
            )
        return out[:, ids.shape[1] :].numpy()

    half, full = torch_model(folder, "bfloat16").eval(), torch_model(folder, "float32").eval()
    rivals = {
        "ours": ours,
        "transformers bfloat16 weights": lambda: theirs(half, False),
        "transformers float32 weights, autocast": lambda: theirs(full, True),
    }
    # Random weights have near ties, after which two greedy texts diverge; the first choices are the same function.
    texts = {name: run() for name, run in rivals.items()}
    same = float(np.mean(texts["ours"][:, 0] == texts["transformers bfloat16 weights"][:, 0]))
    seconds = interleaved(rivals, arguments.repeats)
    rival = min(list(rivals)[1:], key=lambda name: median(seconds[name]))
    count, time = len(prompts) * new, median(seconds[rival])
    sizes = {"prompts": len(prompts), "prompt_length": prompts.shape[1], "new_tokens": new}
    return [
        row(
            "generate_transformers",
            count / time,
            "tokens/s",
            None,
            "",
            variant=rival,
            **sizes,
            **spread(seconds[rival]),
        ),
        row(
            "generate",
            count / median(seconds["ours"]),
            "tokens/s",
            median(seconds["ours"]) / time,
            "generate_transformers",
            same_first_tokens=same,
            **sizes,
            **spread(seconds["ours"]),
        ),
    ]


def perplexities(
    folder: Any, params: Any, spec: ModelSpec, tokens: Any, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one pass over windows, whose perplexities must agree."""
    import torch

    everything = np.ones(tokens.shape[1], bool)
    windows = [Tokenized(tokens=window, loss=everything) for window in tokens]
    size = arguments.batch_windows

    def ours() -> float:
        return perplexity(params, windows, spec, batch_size=size, compute_dtype="bfloat16").value

    def theirs(model: Any, autocast: bool) -> float:
        nll, count = 0.0, 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for start in range(0, len(tokens), size):
                ids = torch.tensor(tokens[start : start + size].astype(np.int64))
                predicted = ids[:, 1:].numel()
                nll += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * predicted
                count += predicted
        return float(np.exp(nll / count))

    half, full = torch_model(folder, "bfloat16").eval(), torch_model(folder, "float32").eval()
    rivals = {
        "ours": ours,
        "transformers bfloat16 weights": lambda: theirs(half, False),
        "transformers float32 weights, autocast": lambda: theirs(full, True),
    }
    values = {name: run() for name, run in rivals.items()}
    seconds = interleaved(rivals, arguments.repeats)
    rival = min(list(rivals)[1:], key=lambda name: median(seconds[name]))
    agree("perplexity", float(np.log(values["ours"])), float(np.log(values[rival])))
    time, sizes = median(seconds[rival]), {"windows": len(tokens), "length": tokens.shape[1], "batch_size": size}

    def measured(name: str, of: str, ratio: float | None, against: str) -> dict[str, Any]:
        details = {"variant": of, "perplexity": round(values[of], 2), **sizes, **spread(seconds[of])}
        return row(name, median(seconds[of]), "seconds", ratio, against, **details)

    return [
        measured("perplexity_transformers", rival, None, ""),
        measured("perplexity", "ours", median(seconds["ours"]) / time, "perplexity_transformers"),
    ]


def torch_model(folder: Any, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    found = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=found, attn_implementation="sdpa")


def agree(what: str, ours: float, theirs: float) -> None:
    """Ends the run if the two sides do not compute the same thing; nats per token."""
    print(json.dumps({"check": what, "ours": round(ours, 4), "theirs": round(theirs, 4)}), flush=True)
    if not abs(ours - theirs) <= LOSS_TOLERANCE:
        raise SystemExit(f"{what}: {ours:.4f} nats per token here, {theirs:.4f} there; not the same function")


def write_random(folder: Path, config: str) -> Path:
    """Random weights of a `config.json`'s shape, rounded to bfloat16 so that neither side alone rounds them."""
    shape = json.loads(Path(config).read_text()) if config else SMOLLM2_135M
    spec = spec_from_config(shape)
    save_pretrained(folder, init_params(jax.random.key(0), spec, "bfloat16"), spec)
    return folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed beside transformers + peft on this machine's CPU.")
    parser.add_argument("--model", default="", help="Hugging Face folder; random weights without it")
    parser.add_argument("--config", default="", help="config.json whose shape the random weights take")
    parser.add_argument("--only", nargs="+", default=["step", "generation", "perplexity"])
    parser.add_argument(
        "--remat", nargs="+", default=["none", "linears", "block"], choices=["none", "linears", "block"]
    )
    parser.add_argument("--dtype", default="bfloat16", help="dtype in which this program keeps the weights")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2, help="sequences of one update")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence and of a window")
    parser.add_argument("--windows", type=int, default=8, help="windows of the perplexity")
    parser.add_argument("--batch-windows", type=int, default=4, help="windows of one forward pass")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
