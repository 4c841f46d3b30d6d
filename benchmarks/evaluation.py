"""Evaluation beside transformers (torch) on the same CPU, weights, rows, batch size and threads, in one run.

    python benchmarks/evaluation.py --model DIR_OR_GGUF [--only parity ...] [--out docs/results/NAME.json]

The model is any that `load_pretrained` reads, with its tokenizer; it is written once as a float32 Hugging Face folder,
which transformers reads as float32 or rounds to bfloat16, as this program does. Text rows are made of the words below.

- `parity`: greedy tokens in float32, prompt by prompt. Where two texts diverge, the logits of both sides are computed
  again for the common prefix, and the gap between the two chosen tokens is reported.
- `scoring`: the likelihood of answers, rows per second. `rows` are prompts with nothing in common and answers of one
  token, for which transformers needs one forward pass; `contracts` are documents with several hypotheses each and
  answers of several tokens, for which it runs prompt and answer, left-padded, once per answer.
- `generation`: tokens per second, greedy and sampled (temperature 0.9, top_k 50, top_p 0.9), every token written.

Repetitions alternate between all rivals; a row has the median and its spread. `ratio` is our time over theirs.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rows import interleaved, keep, median, row, spread
from vs_peft import torch_model

from efx_jax.data.prompts import Example
from efx_jax.data.tokenizer import encode_continuations, encode_prompts
from efx_jax.evaluation.tasks import label_scores
from efx_jax.model.generate import generate
from efx_jax.model.sampling import Sampling
from efx_jax.model.spec import ModelSpec
from efx_jax.weights.hf import load_pretrained, load_tokenizer, save_pretrained

DTYPES = ("float32", "bfloat16")
SAMPLING = Sampling(temperature=0.9, top_k=50, top_p=0.9)
TIE = 1e-5  # gap of two logits that float32 sums in another order may swap
# Largest difference of a score (nats) between the two sides, whose sums have different orders.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}

SUBJECTS = (
    "a lease for a shop",
    "high blood pressure",
    "the sale of a used car",
    "a broken wrist",
    "a claim for unpaid wages",
    "fever in a small child",
    "the estate of a farmer",
    "migraine with aura",
    "a patent on a pump",
    "iron deficiency",
    "a dispute between neighbours",
    "asthma at night",
    "the duties of a trustee",
    "back pain after lifting",
    "a late delivery of steel",
    "type 2 diabetes",
)
FRAMES = (
    "Explain {subject} in simple words.",
    "Question: What should somebody know first about {subject}?\nAnswer:",
    "Below is a note that was written in a hurry. It mentions {subject}, two dates, a phone call on Tuesday and a "
    "letter that nobody has answered yet. Rewrite it as a short and polite message to a colleague.\n\nMessage:",
    "The following list has been collected from several offices over the last year. First, every file that concerns "
    "{subject} is kept for ten years. Second, whoever opens such a file writes down the day, the reason and the name "
    "of the person who asked for it. Third, copies are made only when a court or a physician requires them, and they "
    "are numbered. Fourth, a file that is closed goes to the archive within a month. Which of the rules matters "
    "most, and why?\n\nThe rule that matters most is",
)
TEXT = (
    "the party shall not disclose any of this information to a third person unless a court orders it in writing and "
    "notice has been given within thirty days after that patients who took part were examined again two weeks later by "
    "another physician and their results agreed with those of the first visit in all but four cases of mild fever"
)
ONE_TOKEN = (" yes", " no", " maybe")
SEVERAL_TOKENS = (" it follows from the text", " the text contradicts it", " nothing is said of it")


def main() -> None:
    arguments = parse()
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "jax": jax.__version__}))
    tokenizer = load_tokenizer(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        params, spec = load_pretrained(arguments.model, dtype="float32")
        folder = Path(scratch) / "model"
        save_pretrained(folder, params, spec)
        del params
        parts = {"parity": parity, "scoring": scoring, "generation": generation}
        for name in arguments.only:
            keep(arguments.out, parts[name](folder, spec, tokenizer, arguments))


def parity(folder: Path, spec: ModelSpec, tokenizer: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The row with the share of prompts after which both sides write the same tokens."""
    params, _ = load_pretrained(folder, dtype="float32")
    model = torch_model(folder, "float32").eval()
    prompts = sorted(encode_prompts(varied_prompts(arguments.prompts), tokenizer), key=len)
    new, stops = arguments.new_tokens, spec.eos_token_ids
    gaps, same = [], 0
    for start in range(0, len(prompts), arguments.batch):
        chosen = prompts[start : start + arguments.batch]
        tokens, lengths = padded(chosen, "right")
        ours = np.asarray(generate(params, tokens, lengths, spec, new, stop_tokens=stops))
        theirs = their_texts(model, chosen, new, None, stops)
        for prompt, left, right in zip(chosen, ours.tolist(), theirs.tolist(), strict=True):
            place = next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)
            if place is None:
                same += 1
            else:
                gaps.append(gap(params, spec, model, prompt + left[:place], left[place], right[place]))
    ties = sum(found <= TIE for found in gaps)
    details = {"prompts": len(prompts), "new_tokens": new, "shortest": len(prompts[0]), "longest": len(prompts[-1])}
    details |= {"other_than_a_tie": len(gaps) - ties, "gaps": [float(f"{found:.2e}") for found in gaps]}
    return [row("greedy_same_tokens float32", same / len(prompts), "share of prompts", None, "", **details)]


def gap(params: Any, spec: ModelSpec, model: Any, ids: Sequence[int], ours: int, theirs: int) -> float:
    """The gap between the logits of two tokens after the same text: the larger of the two sides'."""
    import torch

    from efx_jax.model.decoder import forward

    mine = np.asarray(forward(params, jnp.asarray([ids]), spec))[0, -1]
    with torch.no_grad():
        other = model(input_ids=torch.tensor([list(ids)])).logits[0, -1].numpy()
    return max(abs(float(logits[ours] - logits[theirs])) for logits in (mine, other))


def scoring(folder: Path, spec: ModelSpec, tokenizer: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for the likelihood of answers."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(arguments.length // 3, arguments.length, arguments.rows)
    plain = [Example(f"{sentence(rng, size)}\nQuestion: Is it so?\nAnswer:", "") for size in sizes]
    document = sentence(rng, arguments.length)
    hypotheses = [sentence(rng, size) for size in rng.integers(10, 25, arguments.hypotheses)]
    contracts = [Example(f"{document}\nHypothesis: {claim}\nAnswer:", "") for claim in hypotheses]
    cases = {"rows": (plain, ONE_TOKEN), "contracts": (contracts, SEVERAL_TOKENS)}
    found = []
    for dtype in DTYPES:
        params, _ = load_pretrained(folder, dtype=dtype)
        model = torch_model(folder, dtype).eval()
        for name, (examples, labels) in cases.items():

            def ours(examples: Any = examples, labels: Any = labels, params: Any = params) -> Any:
                return label_scores(params, spec, tokenizer, examples, labels, batch_size=arguments.batch)

            def theirs(examples: Any = examples, labels: Any = labels, model: Any = model) -> Any:
                return their_scores(model, tokenizer, examples, labels, arguments.batch)

            scores = {"ours": ours(), "transformers": theirs()}
            distance = float(np.abs(scores["ours"] - scores["transformers"]).max())
            if not distance <= TOLERANCE[dtype]:
                raise SystemExit(f"scores of {name} in {dtype}: {distance:.3g} nats apart; not the same function")
            seconds = interleaved({"ours": ours, "transformers": theirs}, arguments.repeats)
            details = {"rows": len(examples), "answers": len(labels), "batch_size": arguments.batch}
            details |= {"most_nats_apart": float(f"{distance:.1e}")}
            found += both(f"score_{name} {dtype}", len(examples), "rows/s", seconds, details)
    return found


def their_scores(model: Any, tokenizer: Any, examples: Any, labels: Sequence[str], batch_size: int) -> np.ndarray:
    """Log-likelihood of every answer `[rows,C]`: one pass if all answers are one token, else one pass for each."""
    import torch

    prompts = encode_prompts([example.prompt for example in examples], tokenizer)
    answers = encode_continuations(labels, tokenizer)
    passes = [answers] if all(len(ids) == 1 for ids in answers) else [[ids] for ids in answers]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    scores = np.zeros((len(prompts), len(labels)))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        columns = []
        for group in passes:
            rows = [prompts[number] + group[0][:-1] for number in chosen]
            with torch.no_grad():
                logits = model(**left_padded(rows), logits_to_keep=len(group[0]), use_cache=False).logits
            likely = torch.log_softmax(logits.float(), dim=-1)
            targets = torch.tensor(group)
            columns += [likely[:, range(len(ids)), ids].sum(dim=1) for ids in targets]
        scores[chosen] = torch.stack(columns, dim=1).numpy()
    return scores


def generation(folder: Path, spec: ModelSpec, tokenizer: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of greedy and sampled decoding of one ragged batch, the longest of the prompts."""
    everything = sorted(encode_prompts(varied_prompts(arguments.prompts), tokenizer), key=len)
    prompts, new = everything[-arguments.batch :], arguments.new_tokens
    tokens, lengths = padded(prompts, "right")
    found = []
    for dtype in DTYPES:
        params, _ = load_pretrained(folder, dtype=dtype)
        model = torch_model(folder, dtype).eval()
        for name, sampling in (("greedy", None), ("sampled", SAMPLING)):

            def ours(sampling: Any = sampling, params: Any = params) -> Any:
                key = None if sampling is None else jax.random.key(0)
                return np.asarray(generate(params, tokens, lengths, spec, new, sampling=sampling, key=key))

            def theirs(sampling: Any = sampling, model: Any = model) -> Any:
                return their_texts(model, prompts, new, sampling, ())

            same = float(np.mean(ours() == theirs()))
            seconds = interleaved({"ours": ours, "transformers": theirs}, arguments.repeats)
            details = {"prompts": len(prompts), "longest": len(prompts[-1]), "new_tokens": new}
            if sampling is None:
                details["same_tokens"] = round(same, 4)
            found += both(f"generate_{name} {dtype}", len(prompts) * new, "tokens/s", seconds, details)
    return found


def their_texts(
    model: Any, prompts: Sequence[Sequence[int]], new: int, sampling: Sampling | None, stops: Sequence[int]
) -> np.ndarray:
    """What transformers writes after the prompts, int `[B,new]`, -1 after a stop token; it pads on the left."""
    import torch

    batch = left_padded(prompts)
    # Without a stop token here, transformers uses the model's own.
    model.generation_config.eos_token_id = list(stops) or None
    how: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    with torch.no_grad():
        out = model.generate(**batch, **how, max_new_tokens=new, pad_token_id=0)
    written = out[:, batch["input_ids"].shape[1] :].numpy()
    texts = np.full((len(prompts), new), -1)
    texts[:, : written.shape[1]] = written
    behind = np.cumsum(np.isin(texts, list(stops)), axis=1) - np.isin(texts, list(stops)) > 0
    return np.where(behind, -1, texts)


def left_padded(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A ragged batch as transformers takes it, padded on the left."""
    import torch

    tokens, lengths = padded(rows, "left")
    mask = np.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
    return {
        "input_ids": torch.tensor(tokens, dtype=torch.int64),
        "attention_mask": torch.tensor(mask, dtype=torch.int64),
        "position_ids": torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0)),
    }


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Token rows as int32 `[B,T]`, and their lengths."""
    lengths = np.asarray([len(ids) for ids in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for line, ids in zip(tokens, rows, strict=True):
        line[slice(0, len(ids)) if side == "right" else slice(len(line) - len(ids), None)] = ids
    return tokens, lengths


def both(
    name: str, count: int, unit: str, seconds: Mapping[str, Any], details: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The two rows of a comparison: theirs, then ours with the ratio of the times."""
    mine, other = seconds["ours"], seconds["transformers"]
    ratio, against = median(mine) / median(other), f"{name} transformers"
    return [
        row(against, count / median(other), unit, None, "", **details, **spread(other)),
        row(name, count / median(mine), unit, ratio, against, **details, **spread(mine)),
    ]


def varied_prompts(count: int) -> list[str]:
    """Prompts of very different lengths, all different up to 64."""
    pairs = [frame.format(subject=subject) for subject in SUBJECTS for frame in FRAMES]
    return [pairs[number % len(pairs)] for number in range(count)]


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(TEXT.split(), words))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluation beside transformers on this machine's CPU.")
    parser.add_argument("--model", required=True, help="Hugging Face folder or .gguf file, with its tokenizer")
    parser.add_argument("--only", nargs="+", default=["parity", "scoring", "generation"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="rows of a pass, on both sides")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=48, help="rows with nothing in common")
    parser.add_argument("--length", type=int, default=400, help="words of a document, and of the longest row")
    parser.add_argument("--hypotheses", type=int, default=17, help="hypotheses behind a document")
    parser.add_argument("--out", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
