"""How good the model is: an estimate while it trains, an exact figure afterwards."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fused_ce.babygpt import data as batches  # `data` is the name of an argument here
from fused_ce.babygpt.checkpoint import load_model
from fused_ce.babygpt.config import EvalConfig
from fused_ce.babygpt.corpora import text_sha256
from fused_ce.babygpt.device import resolve_device
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.model import BabyGPT, evaluating

ESTIMATE_SEED = 0


@torch.no_grad()
def estimate_loss(
    model: nn.Module,
    data: Mapping[str, np.ndarray | Tensor],
    batch_size: int,
    block_size: int,
    eval_iters: int,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Estimate the loss on each split from random batches, in eval mode, without gradients.

    Args:
        model: `model(x, y)` returns (logits, loss).
        data: {"train": tokens, "val": tokens}, as `get_batch` takes them.
        batch_size: windows in a batch.
        block_size: tokens in a window.
        eval_iters: batches of each split.
        generator: draws the batches. None is a new one with a fixed seed, so that training batches
            stay as they are and two estimates differ by the model alone.

    Returns:
        The mean loss in nats of each split. The model is in its mode again, also after an error.

    Raises:
        ValueError: eval_iters is not positive, or a split is shorter than a window.
    """
    if eval_iters < 1:
        raise ValueError(f"eval_iters must be positive, got {eval_iters}")
    if generator is None:
        generator = torch.Generator().manual_seed(ESTIMATE_SEED)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    losses = []
    with evaluating(model):
        for tokens in data.values():
            for _ in range(eval_iters):
                x, y = batches.get_batch(
                    tokens, batch_size, block_size, generator=generator, device=device
                )
                losses.append(model(x, y)[1])
    means = torch.stack(losses).double().view(len(data), eval_iters).mean(dim=1)
    return dict(zip(data, means.tolist(), strict=True))  # the one synchronisation


@torch.no_grad()
def exact_loss(model: BabyGPT, tokens: np.ndarray, batch_size: int = 64) -> float:
    """Return the mean loss in nats over all tokens but the first, each counted once.

    The windows lie side by side, so the contexts are as long as in training: from one token to a
    block. Nothing is drawn.

    Args:
        model: its block size is the length of the windows; the last one may be shorter.
        tokens: (n,) of an integer dtype, n at least 2.
        batch_size: windows in a batch.
    """
    device = next(model.parameters()).device
    block_size = model.config.block_size
    sequence = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    x, y = sequence[:-1], sequence[1:]
    n_full = len(x) // block_size * block_size
    pieces: list[tuple[Tensor, Tensor]] = []
    if n_full:
        windows = [piece[:n_full].view(-1, block_size).split(batch_size) for piece in (x, y)]
        pieces += zip(*windows, strict=True)
    if n_full < len(x):
        pieces.append((x[None, n_full:], y[None, n_full:]))
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(model):
        for x_piece, y_piece in pieces:
            loss = model(x_piece.to(device), y_piece.to(device))[1]
            total += loss.double() * y_piece.numel()
    return total.item() / len(x)


def evaluate(config: EvalConfig) -> None:
    """Print loss, perplexity and bits per character over every token of a text, or of a split.

    Bits per character are those of the whole text over its characters, so that they compare
    models whatever their tokens are. The first token, which nothing comes before, is left out.

    Raises:
        UserError: there is no usable checkpoint or device, or the text has characters unknown to
            the model.
    """
    device = resolve_device(config.device)
    model, tokenizer, saved = load_model(config.checkpoint)
    data = config.data
    if data is None:
        data = saved["config"]["data"]
        batches.require_text_of_run(data)
    text = batches.load_text(data)
    is_own = text_sha256(text) == saved["corpus_sha256"]
    split = config.split or ("val" if is_own else "all")
    tokens = tokenizer.encode(text if split == "all" else batches.split_text(text)[split])
    what, unit = "all of the text" if split == "all" else f"{split} split", tokenizer.unit
    if len(tokens) < 2:
        raise UserError(f"{data!r}, {what}: at least 2 {unit}s are needed, got {len(tokens)}")
    loss = exact_loss(model.to(device), tokens)
    n_predicted, n_characters = len(tokens) - 1, len(tokenizer.decode(tokens[1:].tolist()))
    bits = loss * n_predicted / math.log(2) / n_characters
    print(f"{data}: {what}, {len(tokens):,} {unit}s, at step {saved['step']}")
    print(f"loss                {loss:.4f} nats per {unit}")
    print(f"perplexity          {math.exp(loss) if loss < 700 else math.inf:.4f}")
    print(f"bits per character  {bits:.4f}")
