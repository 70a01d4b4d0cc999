"""A vocabulary that lies on several processes: each has rows of token embedding and head.

All processes see the same batch and hold the same copy of everything else, so they compute the same
hidden states. Embeddings are summed over the processes, each token's from the one that has it; the
loss exchanges a few numbers a token, and sums the gradient of the hidden states.
"""

from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ce import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.model import BabyGPT


@dataclass(frozen=True)
class Shards:
    """How many rows of the vocabulary each process has, in rank order."""

    sizes: tuple[int, ...]
    rank: int

    @property
    def first(self) -> int:
        """The first row of this process."""
        return sum(self.sizes[: self.rank])

    def mine(self, whole: Tensor) -> Tensor:
        """Return the rows of this process, in the memory of the whole."""
        return whole.split(self.sizes)[self.rank]

    @torch.no_grad()
    def whole(self, shard: Tensor) -> Tensor:
        """Return the rows of all processes; all of them call it."""
        padded = shard.new_zeros(max(self.sizes), *shard.shape[1:])  # gloo gathers equal sizes only
        padded[: len(shard)] = shard
        pieces = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, self.sizes, strict=True)])


class ShardedEmbedding(nn.Module):
    """The token embedding, of which this process has some rows.

    Args:
        weight: these rows, in memory of their own.
        shards: which they are.
    """

    def __init__(self, weight: nn.Parameter, shards: Shards):
        """Take the rows."""
        super().__init__()
        self.weight = weight
        self.shards = shards

    def forward(self, idx: Tensor) -> Tensor:
        """Map (B, T) tokens to (B, T, C), the same on every process."""
        here = idx - self.shards.first
        is_mine = (here >= 0) & (here < len(self.weight))
        x = F.embedding(here.where(is_mine, 0), self.weight)
        return _Summed.apply(x.masked_fill(~is_mine[..., None], 0.0))


class ShardedHead(nn.Module):
    """The last linear map, of which this process has some rows.

    Args:
        weight: these rows, in memory of their own.
        bias: its part for them, or None.
        shards: which they are.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, shards: Shards):
        """Take the rows."""
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.shards = shards

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., C) to the logits (..., V) of the whole vocabulary, without a gradient."""
        logits = F.linear(hidden, self.weight, self.bias)
        return self.shards.whole(logits.movedim(-1, 0)).movedim(0, -1)


def _fused_loss(
    hidden: Tensor,
    head: ShardedHead,
    targets: Tensor,
    normalizer: Tensor | None = None,
    *,
    inplace: bool,
) -> Tensor:
    logits = F.linear(_WithSummedGradient.apply(hidden), head.weight, head.bias)
    return vocab_parallel_cross_entropy(
        logits,
        targets,
        dim=-1,
        normalizer=normalizer,
        inplace=inplace,
        shard_sizes=head.shards.sizes,
    )


def _linear_loss(
    hidden: Tensor, head: ShardedHead, targets: Tensor, normalizer: Tensor | None = None
) -> Tensor:
    return vocab_parallel_linear_cross_entropy(
        hidden,
        head.weight,
        targets,
        linear_bias_shard=head.bias,
        normalizer=normalizer,
        shard_sizes=head.shards.sizes,
    )


def shard_vocabulary(
    model: BabyGPT, loss: str, *, inplace: bool, rank: int, n_processes: int
) -> None:
    """Leave this process its rows of the model's embedding and head, and a loss that knows of it.

    A forward with targets returns no logits, whatever the loss: nobody has them whole.

    Raises:
        UserError: there are more processes than tokens.
    """
    n_rows = model.config.vocab_size
    if n_processes > n_rows:
        raise UserError(
            f"--vocab-parallel needs a token for each process, got {n_rows} tokens "
            f"and {n_processes} processes"
        )
    share, n_larger = divmod(n_rows, n_processes)
    sizes = tuple(share + (of_rank < n_larger) for of_rank in range(n_processes))
    shards = Shards(sizes, rank)

    def mine(whole: Tensor) -> nn.Parameter:
        return nn.Parameter(shards.mine(whole.detach()).clone())

    bias = None if model.head.bias is None else mine(model.head.bias)
    head = ShardedHead(mine(model.head.weight), bias, shards)
    weight = head.weight if model.config.tie_weights else mine(model.token_embedding.weight)
    # A part stands where the whole is declared.
    model.token_embedding = ShardedEmbedding(weight, shards)  # type: ignore[assignment]
    model.head = head  # type: ignore[assignment]
    model.loss = _linear_loss if loss == "linear" else partial(_fused_loss, inplace=inplace)
    model.loss_takes_head = True


def has_sharded_vocabulary(model: nn.Module) -> TypeGuard[BabyGPT]:
    """Whether this process has a part of the model's vocabulary only."""
    return isinstance(getattr(model, "head", None), ShardedHead)


def sharded_parameters(model: BabyGPT) -> dict[Tensor, None]:
    """Return the parameters of which this process has a part, in the order of the model's."""
    parts = (model.token_embedding.weight, model.head.weight, model.head.bias)
    return dict.fromkeys(part for part in parts if part is not None)


def clip_gradients(model: BabyGPT, max_norm: float) -> Tensor:
    """Clip the gradient as if it were in one place, and return its norm, equal on all processes.

    What every process has a copy of gets the first one's gradient: sums that a GPU makes in no
    fixed order differ in their last bits, and the copies would drift apart.
    """
    sharded = sharded_parameters(model)
    copies = [p.grad for p in model.parameters() if p not in sharded and p.grad is not None]
    if copies:
        _take_the_first_ones(copies)
    of_copies = torch.nn.utils.get_total_norm(copies).double()
    of_shards = torch.nn.utils.get_total_norm(
        [p.grad for p in sharded if p.grad is not None]
    ).double()
    square = of_shards.square()
    dist.all_reduce(square)
    norm = (square + of_copies.square()).sqrt().float()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def _take_the_first_ones(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])  # one message
    dist.broadcast(flat, 0)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view_as(tensor))


def _shards_of(model: BabyGPT) -> Shards:
    return model.head.shards  # type: ignore[return-value]  # the head is a ShardedHead


def whole_state(model: BabyGPT, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """Return the states that model and optimiser would have in one process; all call it."""
    shards, parts = _shards_of(model), sharded_parameters(model)
    wholes = {part: shards.whole(part) for part in parts}  # tied ones once
    model_state = {
        name: wholes[value] if value in wholes else value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
    }
    return model_state, _with_rows(optimizer, optimizer.state_dict(), parts, shards.whole)


def load_whole_state(
    model: BabyGPT, optimizer: torch.optim.Optimizer, model_state: dict, optimizer_state: dict
) -> None:
    """Load what `whole_state` returned, or one process saved; every process takes its rows."""
    shards, parts = _shards_of(model), sharded_parameters(model)
    own = model.state_dict(keep_vars=True)
    model.load_state_dict(
        {
            name: shards.mine(value) if own.get(name) in parts else value
            for name, value in model_state.items()
        }
    )

    def mine(whole):
        return shards.mine(whole).clone()  # the optimiser keeps it, and the whole can go

    optimizer.load_state_dict(_with_rows(optimizer, optimizer_state, parts, mine))


def _with_rows(optimizer, optimizer_state, parts, change) -> dict:
    """Return the state with what belongs to the rows of these parameters changed."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    state = {
        number: {
            name: change(value) if parameters[number] in parts and value.dim() else value
            for name, value in of_parameter.items()
        }
        for number, of_parameter in optimizer_state["state"].items()
    }
    return {**optimizer_state, "state": state}


class _Summed(torch.autograd.Function):
    """The sum over the processes; what comes back is whole already, and the same on each."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _WithSummedGradient(torch.autograd.Function):
    """The same x; what comes back is a part on each process, and the sum goes on."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # it may not be ours
        dist.all_reduce(gradient)
        return gradient
