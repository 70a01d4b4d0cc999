"""Text from a model, one token at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_ce.babygpt.checkpoint import load_model
from fused_ce.babygpt.config import SampleConfig
from fused_ce.babygpt.device import resolve_device
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.model import BabyGPT, KeyValueCache, evaluating
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
    on_token: Callable[[Tensor], object] | None = None,
    use_cache: bool = True,
    vocab_size: int | None = None,
) -> Tensor:
    """Continue every row of idx; the model sees at most its block size of what came before.

    Args:
        model: `model(idx)` returns (logits, loss); put in eval mode meanwhile.
        idx: (B, T) tokens, T at least 1.
        max_new_tokens: tokens to add.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the fewest tokens that have this probability together.
        generator: where the randomness comes from, on the device of idx; None is PyTorch's own.
        on_token: called with each new (B, 1) token; the text ends where it returns True.
        use_cache: compute each position once while the context fits in the block, if the model
            can.
        vocab_size: draw from that many tokens, the first, where the model's vocabulary is padded.

    Returns:
        (B, T + max_new_tokens) tokens, or fewer where on_token ended the text.
    """
    cache = model.new_cache() if use_cache and hasattr(model, "new_cache") else None
    with evaluating(model):
        for _ in range(max_new_tokens):
            logits = next_logits(model, idx, cache)[:, :vocab_size]
            token = choose_token(logits, temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
            if on_token is not None and on_token(token) is True:
                break
    return idx


def next_logits(model: BabyGPT, idx: Tensor, cache: list[KeyValueCache] | None = None) -> Tensor:
    """Return the (B, V) logits of what comes after idx (B, T), of which a cache has the beginning.

    Beyond the block size the context is its last block, in which every token has another position
    than a step before: a cache would hold nothing that is still true, so none is used.
    """
    if cache and idx.shape[1] <= model.config.block_size:
        return model(idx[:, cache[0].length :], cache=cache)[0][:, -1]
    return model(idx[:, -model.config.block_size :])[0][:, -1]


def choose_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a (B, 1) token for each row of the (B, V) logits; arguments as in `generate`.

    Raises:
        UserError: the logits are not finite.
    """
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its training has diverged")
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


class StopText:
    """Passes text on up to a stop text; what may be the beginning of one waits for what follows.

    Args:
        stop: the text, or None for no end.
        write: where the text goes.
    """

    def __init__(self, stop: str | None, write: Callable[[str], object]):
        """Begin with nothing held back."""
        self.stop = stop
        self.write = write
        self.held = ""
        self.stopped = False

    def feed(self, text: str) -> bool:
        """Take more text, and return whether the stop text has come; what follows it is lost."""
        if self.stopped:
            return True
        text, self.held = self.held + text, ""
        if self.stop is None:
            self.write(text)
            return False
        before, found, _ = text.partition(self.stop)
        if not found:
            n_held = next(
                n for n in range(len(self.stop) - 1, -1, -1) if text.endswith(self.stop[:n])
            )
            before, self.held = text[: len(text) - n_held], text[len(text) - n_held :]
        self.write(before)
        self.stopped = bool(found)
        return self.stopped

    def finish(self) -> None:
        """Pass on what was held back: no stop text will come."""
        self.write(self.held)
        self.held = ""


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
    stop: str | None = None,
) -> None:
    """Print the prompt and its continuation, each token when it is drawn, up to the stop text.

    Without a prompt the text begins as after a line break, which is not printed.

    Raises:
        UserError: the prompt or the stop text has characters that the vocabulary lacks.
    """
    device = next(model.parameters()).device
    start = prompt or tokenizer.start
    idx = torch.from_numpy(tokenizer.encode(start).astype("int64"))[None].to(device)
    if stop is not None:
        tokenizer.encode(stop)  # what cannot be said cannot end a text either
    decode = tokenizer.incremental_decoder()  # a token may end in the middle of a character
    text = StopText(stop, lambda text: print(text, end="", flush=True))
    print(prompt, end="", flush=True)
    try:
        generate(
            model,
            idx,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator(device).manual_seed(seed),
            vocab_size=tokenizer.vocab_size,
            on_token=lambda token: text.feed(decode(token[0].tolist())),
        )
        text.feed(decode([], final=True))
        text.finish()
    finally:
        print(flush=True)  # after Ctrl-C too, the next line is a new one


def sample(config: SampleConfig) -> None:
    """Print continuations of the prompt by the model of a run.

    Raises:
        UserError: there is no usable checkpoint or device, or the prompt has unknown characters.
    """
    device = resolve_device(config.device)
    model, tokenizer, _ = load_model(config.checkpoint)
    model.to(device)
    for i in range(config.num_samples):
        if config.num_samples > 1:
            print(f"--- sample {i + 1} of {config.num_samples}, seed {config.seed + i}")
        stream(
            model,
            tokenizer,
            config.prompt,
            config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed + i,
            top_k=config.top_k,
            top_p=config.top_p,
            stop=config.stop,
        )
