"""One training step of transformers + peft (torch), a case of `train_step.py`: same shape, adapters and batch.

Random bfloat16 weights, attention by `sdpa`, AdamW after norm clipping, loss on every token but the first. `float32`
adapters, peft's default, run under `torch.autocast(bfloat16)`; `bfloat16` ones without. The forward pass takes as many
sequences as fit. If torch, transformers or peft is missing, or torch does not see jax's GPU, the result says so.
"""

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from cases import answer, reason


def measure(case: Mapping[str, Any]) -> dict[str, Any]:
    """Median seconds of an update, the sequences per forward pass, and the peak bytes on a GPU."""
    try:
        import peft  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        return {"error": f"not installed: {error}", "absent": True}
    if case["gpu"] and not torch.cuda.is_available():
        return {"error": "torch does not see the GPU", "absent": True}
    device = "cuda" if case["gpu"] else "cpu"
    model = make_model(case, device)
    ids = torch.randint(0, case["config"]["vocab_size"], (case["batch"], case["length"]), device=device)
    micro = case["batch"]
    while True:
        try:
            run = step(model, ids, micro, case["adapters"] == "float32")
            first_loss, _ = run(), run()
            break
        except torch.OutOfMemoryError as error:
            if micro == 1:
                return {"error": reason(error)}
        # Outside the handler, which keeps alive what the failed pass had allocated.
        micro //= 2
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
    if case["gpu"]:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(run, case["repeats"])
    return {
        "seconds": statistics.median(seconds),
        "fastest": round(min(seconds), 4),
        "slowest": round(max(seconds), 4),
        "micro_batch": micro,
        "batch": case["batch"],
        "length": case["length"],
        "peak_bytes": torch.cuda.max_memory_allocated() if case["gpu"] else None,
        "first_loss": round(first_loss, 4),
        "torch": torch.__version__,
    }


def make_model(case: Mapping[str, Any], device: str) -> Any:
    """The adapted model in training mode, created on its device."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {name: value for name, value in case["config"].items() if name != "_name_or_path"}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if case["checkpointing"]:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=case["rank"], lora_alpha=case["alpha"], target_modules=case["targets"])
    model = get_peft_model(base, lora, autocast_adapter_dtype=case["adapters"] == "float32")
    return model.train()


def step(model: Any, ids: Any, micro_batch: int, autocast: bool) -> Callable[[], float]:
    """A function that runs one update and returns its loss; reading the loss waits for the device."""
    import torch

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    parts = ids.split(micro_batch)

    def run() -> float:
        total = 0.0
        for part in parts:
            with torch.autocast(ids.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = model(input_ids=part, labels=part, use_cache=False).loss / len(parts)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ids.is_cuda:
            torch.cuda.synchronize()
        return float(total)

    return run


def timed(run: Callable[[], float], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True)
    answer(measure, parser.parse_args().case)
