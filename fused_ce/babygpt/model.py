"""The model: token and position embeddings, pre-norm blocks, logits and their loss."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ce import fused_cross_entropy, fused_linear_cross_entropy
from fused_ce.babygpt.config import ModelConfig

IGNORED = -100  # the target of a position that does not count


def fused_loss(
    logits: Tensor, targets: Tensor, normalizer: Tensor | None = None, *, inplace: bool = False
) -> Tensor:
    """Mean loss by this project's operator; logits (..., V), targets (...)."""
    return fused_cross_entropy(  # dim is said, as (B, T, V) may have T = V
        logits, targets, dim=-1, normalizer=normalizer, inplace=inplace
    )


def torch_loss(logits: Tensor, targets: Tensor, normalizer: Tensor | None = None) -> Tensor:
    """Mean loss by PyTorch; logits (..., V), targets (...)."""
    logits, targets = logits.flatten(0, -2), targets.flatten()
    if normalizer is None:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, reduction="sum") / normalizer


def compiled_loss(logits: Tensor, targets: Tensor, normalizer: Tensor | None = None) -> Tensor:
    """Mean loss by what torch.compile makes of PyTorch's; logits (..., V), targets (...)."""
    return _compiled_torch_loss()(logits, targets, normalizer)


@cache
def _compiled_torch_loss() -> Callable[..., Tensor]:
    return torch.compile(torch_loss)  # when it is called: this imports a compiler


def linear_loss(
    hidden: Tensor, head: nn.Linear, targets: Tensor, normalizer: Tensor | None = None
) -> Tensor:
    """Mean loss without whole logits, by this project's operator; hidden (..., C), targets (...).

    To be called inside the forward of the model: there FSDP has the head's weight whole.
    """
    return fused_linear_cross_entropy(
        hidden, head.weight, targets, linear_bias=head.bias, normalizer=normalizer
    )


# Of logits, targets and normalizer; "linear" alone is of hidden states and the head.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "fused": fused_loss, "linear": linear_loss, "torch": torch_loss, "compiled": compiled_loss,
}  # fmt: skip


class KeyValueCache:
    """What attention made of the positions before, so that none of them is computed again.

    Args:
        block_size: the most positions that it can hold.
    """

    def __init__(self, block_size: int):
        """Begin empty; the memory is taken when the first positions come."""
        self.block_size = block_size
        self.length: int = 0  # positions held
        self._held: Tensor | None = None  # (2, B, n_head, block_size, C / n_head)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, n_head, T, C / n_head) of T new positions; return those of all positions."""
        B, n_head, T, size = key.shape
        if self._held is None:
            self._held = key.new_empty(2, B, n_head, self.block_size, size)
        start, self.length = self.length, self.length + T
        self._held[0, :, :, start : self.length] = key
        self._held[1, :, :, start : self.length] = value
        key, value = self._held[:, :, :, : self.length]
        return key, value


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to the positions before it."""

    def __init__(self, config: ModelConfig):
        """Make the two linear maps."""
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.projection = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); with a cache, x comes after the positions in it."""
        B, T, C = x.shape
        heads = self.query_key_value(x).view(B, T, 3, self.n_head, C // self.n_head)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, C / n_head)
        dropout = self.dropout if self.training else 0.0
        mask = None
        if cache is not None:
            key, value = cache.extend(key, value)
        S = key.shape[2]
        if S > T:  # is_causal pairs the first query with the first key; here the last are a pair
            mask = x.new_ones(T, S, dtype=torch.bool).tril(S - T)
        y = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        return self.projection(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Attention, then an MLP four times as wide; each on normed input, added to what came in."""

    def __init__(self, config: ModelConfig):
        """Make attention, MLP and their norms."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential()
        self.mlp.add_module("expansion", nn.Linear(config.n_embd, 4 * config.n_embd))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("projection", nn.Linear(4 * config.n_embd, config.n_embd))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); with a cache, x comes after the positions in it."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class BabyGPT(nn.Module):
    """A GPT that scores the next token at every position.

    With `n_layer = 0` it is embedding to linear with bias, which sees one token only and so has
    neither positions nor a final norm.

    Args:
        config: the shape.
        loss: which cross-entropy computes the loss: a key of LOSSES. With "linear" a forward with
            targets makes no logits.
        inplace: the gradient of the fused loss overwrites the logits.
    """

    token_embedding: nn.Embedding
    position_embedding: nn.Embedding  # with layers, as the next three
    dropout: nn.Dropout
    blocks: nn.Sequential
    norm: nn.LayerNorm
    head: nn.Linear

    def __init__(self, config: ModelConfig, loss: str = "fused", *, inplace: bool = False):
        """Make the layers and draw their weights from PyTorch's global generator."""
        super().__init__()
        self.config = config
        self.loss: Callable[..., Tensor]
        self.loss = partial(fused_loss, inplace=True) if inplace else LOSSES[loss]
        self.loss_takes_head: bool = loss == "linear"  # and hidden states, rather than logits
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.n_layer:
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
            self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=not config.n_layer)
        self._initialise()
        if config.tie_weights:
            self.head.weight = self.token_embedding.weight

    def _initialise(self) -> None:
        """Draw the weights as GPT-2 does."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if name.endswith("projection.weight"):
                # 2 n_layer of them add to the residual stream: this keeps its variance.
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def new_cache(self) -> list[KeyValueCache]:
        """Return an empty cache for `forward`: one for each layer."""
        return [KeyValueCache(self.config.block_size) for _ in range(self.config.n_layer)]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        normalizer: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Score the next token at every position.

        Args:
            idx: (B, T) tokens, T at most the block size.
            targets: (B, T) the tokens that came next, IGNORED where none counts, or None.
            normalizer: 0-d, what the sum of the losses is divided by; None is what counts here.
            cache: of `new_cache`, with what came before idx; idx is added to it.

        Returns:
            logits (B, T, V), and the mean loss in nats, or None without targets. With inplace and
            gradients the logits hold the loss's gradient afterwards. With the linear loss and
            targets the logits are None: they are never whole, in training as in evaluation.

        Raises:
            ValueError: T, with the positions in the cache, is larger than the block size.
        """
        start = cache[0].length if cache else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"idx needs at most {self.config.block_size} positions, got {end}")
        x = self.token_embedding(idx)  # (B, T, C)
        if self.config.n_layer:
            x = self.dropout(
                x + self.position_embedding(torch.arange(start, end, device=idx.device))
            )
            for layer, block in enumerate(self.blocks):
                x = block(x, cache[layer] if cache else None)
            x = self.norm(x)
        if self.loss_takes_head and targets is not None:
            return None, self.loss(x, self.head, targets, normalizer)
        logits = self.head(x)
        if targets is None:
            return logits, None
        return logits, self.loss(logits, targets, normalizer)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and back in its mode afterwards, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
