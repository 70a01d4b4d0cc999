"""Text from a model, one token at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_ce.babygpt.checkpoint import load_model
from fused_ce.babygpt.config import SampleConfig
from fused_ce.babygpt.model import BabyGPT, evaluating
from fused_ce.babygpt.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    model: BabyGPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Continue every row of idx; the model sees at most its block size of what came before.

    Args:
        model: put in eval mode meanwhile.
        idx: (B, T) tokens, T at least 1.
        max_new_tokens: tokens to add.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the fewest tokens that have this probability together.
        generator: where the randomness comes from, on the device of idx; None is PyTorch's own.
        on_token: called with each new (B, 1) token.
        vocab_size: draw below it only: the rest of a padded vocabulary means nothing.

    Returns:
        (B, T + max_new_tokens) tokens.
    """
    with evaluating(model):
        for _ in range(max_new_tokens):
            logits = model(idx[:, -model.config.block_size :])[0][:, -1, :vocab_size]  # (B, V)
            token = choose_token(logits, temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
            if on_token is not None:
                on_token(token)
    return idx


def choose_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a (B, 1) token for each row of the (B, V) logits; arguments as in `generate`."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.double()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no overflow
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    probabilities = ordered.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= top_p] = 0  # the first always stays: before it is 0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, drawn)


def stream(
    model: BabyGPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float,
    seed: int,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """Print the prompt and its continuation, each character when it is drawn.

    Without a prompt the text begins as after a line break, which is not printed.

    Raises:
        UserError: the prompt has characters that the vocabulary lacks.
    """
    device = next(model.parameters()).device
    start = prompt or tokenizer.start
    idx = torch.from_numpy(tokenizer.encode(start).astype("int64"))[None].to(device)
    decode = tokenizer.incremental_decoder()  # a token may end in the middle of a character
    print(prompt, end="", flush=True)
    generate(
        model,
        idx,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
        on_token=lambda token: print(decode(token[0].tolist()), end="", flush=True),
        vocab_size=tokenizer.vocab_size,
    )
    print(decode([], final=True))


def sample(config: SampleConfig) -> None:
    """Print a continuation of the prompt by the model of a run.

    Raises:
        UserError: there is no usable checkpoint, or the prompt has unknown characters.
    """
    model, tokenizer, _ = load_model(config.checkpoint)
    stream(
        model,
        tokenizer,
        config.prompt,
        config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        top_k=config.top_k,
        top_p=config.top_p,
    )
