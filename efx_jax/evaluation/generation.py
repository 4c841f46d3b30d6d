"""What a model generates after prompts, as text."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.data.batches import bucket_length
from efx_jax.data.prompts import Example
from efx_jax.data.tokenizer import Tokenizer, encode_prompts, end_of
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, merge
from efx_jax.model.decoder import Params
from efx_jax.model.generate import generate
from efx_jax.model.sampling import Sampling
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.partition import divisible_rows

Array = jax.Array


def generate_texts(
    params: Params,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    max_new_tokens: int,
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    *,
    batch_size: int = 16,
    compute_dtype: str | None = None,
    sampling: Sampling | None = None,
    seeds: Sequence[int] = (0,),
) -> list[list[str]]:
    """The model's answers to every prompt: a single greedy one, or one sampled per seed.

    Adapters and masks are first merged into a second copy of the linears; otherwise U would be formed for every token.

    Args:
        params: parameter tree.
        spec: the model.
        tokenizer: the model's tokenizer; prompts are tokenised as in training.
        examples: the rows; their prompts are used.
        max_new_tokens: maximum tokens of an answer.
        adapters: LoRA adapters, or None.
        masks: name -> mask `[L,O,I]`, True = kept, or None; the exported function is what generates.
        batch_size: answers generated together, but at least all those to one prompt; rows are sorted by length.
        compute_dtype: dtype of the matmul operands and of the cache; None takes the weights'.
        sampling: how to sample tokens; None takes the most likely one.
        seeds: sampling seeds, one for each of R runs. A row's samples depend only on the seed, the row's number and its
            prompt, and the prefill of a prompt is shared by all runs. Greedy decoding ignores them, and R = 1.

    Returns:
        `[R][rows]` texts, in the examples' order, up to an end of sequence and without special tokens.

    Raises:
        InputError: an empty prompt, or one that leaves no room for the answer in the context (with its row).
    """
    prompts = encode_prompts([example.prompt for example in examples], tokenizer)
    check_room(prompts, examples, spec, max_new_tokens)
    if adapters is not None or masks is not None:
        params = merge(params, adapters, masks)
    ends = {token for example in examples for token in end_of(example.end, tokenizer)}
    stops = end_tokens(tokenizer, spec) | ends
    keys = None if sampling is None else jnp.stack([jax.random.key(seed) for seed in seeds])
    runs = 1 if keys is None else len(keys)
    texts = [[""] * len(prompts) for _ in range(runs)]
    for batch in _batches(prompts, divisible_rows(max(1, batch_size // runs))):
        found = generate(
            params,
            batch["tokens"],
            batch["lengths"],
            spec,
            max_new_tokens,
            stop_tokens=tuple(sorted(stops)),
            compute_dtype=compute_dtype,
            sampling=sampling,
            key=keys,
            rows=batch["rows"],
        )
        for answers, tokens in zip(texts, np.asarray(found).reshape(runs, len(batch["rows"]), -1), strict=True):
            for row, ids in zip(batch["rows"].tolist(), tokens.tolist(), strict=True):
                written = [token for token in ids if token >= 0 and token not in stops]
                answers[row] = tokenizer.decode(written, skip_special_tokens=True)
    return texts


def end_tokens(tokenizer: Tokenizer, spec: ModelSpec) -> set[int]:
    """The tokens that end a text: those of the tokenizer and of the model's config (Llama 3 has several)."""
    return {*spec.eos_token_ids, *end_of("", tokenizer)}


def check_room(
    prompts: Sequence[Sequence[int]], examples: Sequence[Example], spec: ModelSpec, answer_tokens: int
) -> None:
    """Refuses tokenised prompts that are empty or leave fewer than `answer_tokens` tokens of the context.

    Raises:
        InputError: the first such row.
    """
    most = spec.max_position_embeddings - answer_tokens
    if most < 1 and prompts:
        raise InputError(
            f"{examples[0].origin or 'test row 1'}: {answer_tokens} tokens of answer leave no room for a prompt in the "
            f"model's context of {spec.max_position_embeddings}; ask for fewer by data.new_tokens, or shorten them"
        )
    for row, (ids, example) in enumerate(zip(prompts, examples, strict=True), start=1):
        if not 0 < len(ids) <= most:
            raise InputError(
                f"{example.origin or f'test row {row}'}: the prompt has {len(ids)} tokens; expected 1 to {most}, the "
                f"model's context without {answer_tokens} tokens of answer; shorten the prompt"
            )


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Prompts sorted by length and right-padded to few lengths: `tokens` `[B,T]`, `lengths` and `rows` `[B]`, int32."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    longest = max(map(len, prompts), default=0)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # The last batch is filled up with copies of its last row, which end when that row does.
        rows += rows[-1:] * (min(batch_size, divisible_rows(len(order))) - len(rows))
        lengths = np.asarray([len(prompts[row]) for row in rows], np.int32)
        tokens = np.zeros((len(rows), bucket_length(lengths, longest)), np.int32)
        for line, row in enumerate(rows):
            tokens[line, : lengths[line]] = prompts[row]
        yield {"tokens": tokens, "lengths": lengths, "rows": np.asarray(rows, np.int32)}
