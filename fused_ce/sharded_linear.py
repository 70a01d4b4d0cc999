"""Hidden states to the loss of a head whose classes lie on several devices.

A chunk's columns of the logits are read, what they say of each row goes to the other ranks, and
where more memory is no matter the next chunk's product runs meanwhile. The gradient then takes the
place of the logits, and goes into those of hidden states and head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from fused_ce.autograd import grads_of_outputs, outputs_of, sample_weight_gradient
from fused_ce.backend import implementation
from fused_ce.exchange import Exchange, all_reduced
from fused_ce.linear_arguments import Head
from fused_ce.linear_chunks import Plan, cut, placed, without_autocast
from fused_ce.linear_products import Gradients, Operands, Products
from fused_ce.rows import Result, Rows, Upstream, compute_dtype
from fused_ce.sharded_autograd import (
    check_once,
    check_targets,
    counted_weight,
    divisor_of,
    put_together,
    statistics_of,
    upstream_of_rows,
)
from fused_ce.tracing import graph_is_kept

GPU_ROWS = 8192  # of a chunk: the same on every rank, whatever its share of the vocabulary


def sharded_linear_cross_entropy(
    head: Head, rows: Rows, plan: Plan, exchange: Exchange, reduce_hidden_grad: bool
) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions) with return_stats."""
    options = plan.options
    hidden = head.hidden.reshape(math.prod(head.hidden.shape[:-1]), head.hidden.shape[-1])
    inputs: tuple[torch.Tensor | None, ...]
    inputs = hidden, head.weight, head.bias, rows.sample_weight
    if not torch.is_grad_enabled():  # forward then makes no gradients
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    outputs = ShardedLinear.apply(*inputs, rows, plan, exchange, reduce_hidden_grad)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if options.return_stats and options.reduction == "none":
        return outputs[0], *outputs
    return outputs


class ShardedLinear(torch.autograd.Function):
    """Hidden states, and rows of a head, to the loss of all rows of the head."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, sample_weight, rows, plan, exchange, reduces):
        """Loss, and stats if asked for; one exchange a chunk."""
        options, head = plan.options, (hidden, weight, bias)
        *needs, needs_sample_weight = ctx.needs_input_grad[:4]
        in_forward = options.reduction != "none" and options.makes_grad_in_forward(hidden.dtype)
        ctx.plan, ctx.exchange, ctx.reduces = plan, exchange, reduces
        ctx.in_forward = in_forward and any(needs)
        ctx.set_materialize_grads(False)
        rows = _flat(rows, plan, hidden.shape[0])
        with without_autocast(hidden.device):
            chunks = _Chunks(head, rows, plan, exchange, needs if ctx.in_forward else None)
            found = chunks.all_of_them()
            grads = chunks.gradients(reduces)
        ctx.shard = exchange.layout.shard
        losses, divisor = found["losses"], chunks.divisor
        loss = losses
        if options.reduction != "none":
            loss = losses.sum() if divisor is None else losses.sum() / divisor
        result = Result(
            loss, losses, None, found["lse"], found.get("entropy"), found.get("predictions")
        )
        outputs = outputs_of(result, options)
        saved = [found[name] for name in ("weight", "unweighted", "target_weight")]
        ctx.save_for_backward(
            *head, *rows[1:], *saved, loss.clone() if needs_sample_weight else None, divisor,
            *(found.get(name) for name in ("row_max", "row_sum", "share")),
            found["entropy"].clone() if "entropy" in found else None, *grads,
        )  # fmt: skip
        if not options.return_stats:
            return outputs[0]
        ctx.mark_non_differentiable(result.predictions)
        return outputs

    @staticmethod
    def backward(ctx, *grad_outputs):
        """The gradients of hidden, weight, bias and sample_weight."""
        check_once(grad_outputs)
        saved, plan = ctx.saved_tensors, ctx.plan
        head, others, saved = saved[:3], saved[3:7], saved[7:]
        weight, unweighted, target_weight, loss, divisor, *saved = saved
        statistics, grads = tuple(saved[:4]), saved[4:]
        rows = _with_logits(others, head, plan)
        grad_loss, grad_losses, grad_lse, grad_entropy = grads_of_outputs(
            grad_outputs, plan.options
        )
        of_sample_weight = None
        if ctx.needs_input_grad[3] and not (grad_loss is None and grad_losses is None):
            of_sample_weight = sample_weight_gradient(
                grad_loss, grad_losses, rows, loss, unweighted, target_weight, divisor,
                plan.options,
            )  # fmt: skip
        needs = ctx.needs_input_grad[:3]
        made: Sequence[torch.Tensor | None] = (None, None, None)
        if ctx.in_forward and grad_losses is grad_lse is grad_entropy is None:
            made = [_scaled(grad, grad_loss, plan.backend) for grad in grads]
        elif any(needs):
            upstream = upstream_of_rows(grad_loss, grad_losses, weight, divisor)
            with without_autocast(head[0].device):
                made = _made_again(ctx, head, rows, upstream, grad_lse, grad_entropy, statistics)
        return *made, of_sample_weight, None, None, None, None


class _Chunks:
    """The chunks of a forward: results a row, and gradients where they are needed."""

    def __init__(self, head: Operands, rows, plan, exchange, needs):
        self.head, self.rows, self.plan, self.exchange = head, rows, plan, exchange
        self.cut = _cut(rows, plan, head[0].device)
        self.grads = None
        if needs is not None:
            self.grads = Gradients(
                *head, needs, len(self.cut.parts), self.cut.covers_all, wide_hidden=True
            )
        self.divisor: torch.Tensor | None = None
        self.found: list[dict[str, Any]] = []

    def all_of_them(self) -> dict[str, torch.Tensor]:
        """Of all rows, in their places: what backward and the stats are made of."""
        n_ahead = 1 if self.exchange.on_host or len(self.cut.parts) == 1 else 2
        products = [
            Products(*self.head, self.rows, self.plan, self.cut.largest) for _ in range(n_ahead)
        ]
        begun = []
        for number, part in enumerate(self.cut.parts or [slice(0, 0)]):
            chunk = products[number % n_ahead].chunk(part, self.cut.ignored)
            options = self.plan.options._replace(reduction="none")
            statistics = statistics_of(chunk.rows, options, self.plan.backend)
            begun.append((chunk, self.exchange.start(statistics, chunk.rows.weight)))
            if len(begun) == n_ahead:
                self._finish(*begun.pop(0))
        for of_chunk in begun:
            self._finish(*of_chunk)
        return self._placed()

    def _finish(self, chunk, pending):
        gathered = self.exchange.finish(pending)
        options = self.plan.options
        if not self.found:
            check_targets(gathered, self.rows, options, self.exchange.on_host)
        if self.divisor is None and options.reduction == "mean":
            self.divisor = self._divisor()
        found, known = put_together(gathered, chunk.rows, options)
        weight = counted_weight(chunk.rows, known, found.losses.dtype)
        losses = found.losses * weight  # both 0 in ignored rows
        self.found.append(
            dict(
                losses=losses,
                unweighted=found.losses,
                weight=weight,
                lse=found.lse,
                target_weight=known.weight,
                row_max=found.row_max,
                row_sum=found.row_sum,
                share=known.share,
                entropy=found.entropy,
                predictions=found.predictions,
            )  # fmt: skip
        )
        if self.grads is None:
            return
        logits = chunk.rows.logits
        upstream = Upstream(weight if self.divisor is None else weight / self.divisor)
        statistics = found.row_max, found.row_sum, known.share, found.entropy
        implementation(self.plan.backend).shard_gradient(
            upstream, chunk.rows, statistics, options, self.exchange.layout.shard, logits
        )
        self.grads.add(chunk, logits[0])

    def _divisor(self):
        """Of all rows: a sum over ranks where they are weighted by classes."""
        rows, options = self.rows, self.plan.options
        dtype = compute_dtype(rows.logits)
        targets = rows.targets.reshape(-1)
        weight = targets.new_ones(targets.shape, dtype=dtype)
        if rows.sample_weight is not None:
            weight = rows.sample_weight.to(dtype)
        weight = weight.masked_fill(targets == options.ignore_index, 0.0)
        given = rows.normalizer is not None or options.normalizer is not None
        if rows.weight is None or given:
            return divisor_of(rows, options, weight, torch.ones_like(weight))
        if rows.weight.shape[0] == 0:
            return self.exchange.sum(weight.new_zeros(()))
        here = targets - self.exchange.layout.shard.first
        is_mine = (here >= 0) & (here < rows.weight.shape[0])
        of_mine = rows.weight.to(dtype)[here.where(is_mine, 0)].where(is_mine, 0.0)
        return self.exchange.sum((weight * of_mine).sum())

    def _placed(self):
        n_rows, made = self.rows.targets.shape[1], {}
        for name, first in self.found[0].items():
            if first is not None:
                fill = -1 if name == "predictions" else 0
                out = first.new_full((n_rows,), fill)
                made[name] = out
                if self.cut.parts:
                    placed([of_chunk[name] for of_chunk in self.found], self.cut, out)
        return made

    def gradients(self, reduces):
        """Those of hidden, weight and bias, None where nobody needs them."""
        if self.grads is None:
            return None, None, None
        return _finished(self.grads, self.head, self.exchange, reduces)


def _finished(grads, head, exchange, reduces):
    if reduces and grads.hidden is not None:
        grads.hidden = all_reduced(grads.hidden, exchange.group)
    return grads.finished()


def _cut(rows, plan, device):
    """As of one device, but that no rank's share of the vocabulary has a say."""
    if plan.chunk_size is None and device.type != "cpu":
        n_chunks = max(1, -(-rows.targets.shape[1] // GPU_ROWS))
        plan = plan._replace(chunk_size=max(1, -(-rows.targets.shape[1] // n_chunks)))
    return cut(rows, plan, device)


def _flat(rows, plan, n_rows):
    """(1, n_rows, ...)."""
    vocab_size = rows.logits.shape[2]
    return rows._replace(
        logits=rows.logits.reshape(1, n_rows, vocab_size),
        targets=rows.targets.reshape(1, n_rows).long(),
    )


def _with_logits(others, head, plan):
    """Rows whose logits take no memory."""
    shape = 1, head[0].shape[0], head[1].shape[0]
    return Rows(head[0].detach().new_zeros((), dtype=plan.logits_dtype).expand(shape), *others)


def _made_again(ctx, head: Operands, rows, upstream, grad_lse, grad_entropy, statistics):
    """The gradients of hidden, weight and bias from the logits of a chunk, once more."""
    plan, pieces = ctx.plan, _cut(rows, ctx.plan, head[0].device)
    grads = Gradients(
        *head, ctx.needs_input_grad[:3], len(pieces.parts), pieces.covers_all, wide_hidden=True
    )
    products = Products(*head, rows, plan, pieces.largest)
    for part in pieces.parts:
        chunk = products.chunk(part, pieces.ignored)
        logits = chunk.rows.logits
        of_rows = [
            None if of is None else of[part]
            for of in (upstream, grad_lse, grad_entropy, *statistics)
        ]
        implementation(plan.backend).shard_gradient(
            Upstream(*of_rows[:3]), chunk.rows, tuple(of_rows[3:]), plan.options, ctx.shard, logits
        )
        grads.add(chunk, logits[0])
    return _finished(grads, head, ctx.exchange, ctx.reduces)


def _scaled(grad, grad_loss, backend):
    """A finished gradient times the upstream one; in place where nobody needs it again."""
    if grad is None or grad_loss is None:
        return None
    kept = graph_is_kept()
    out = torch.empty_like(grad) if kept else grad
    of_rows = [of.view(1, of.shape[:-1].numel(), of.shape[-1]) for of in (grad, out)]
    implementation(backend).scale(of_rows[0], grad_loss, of_rows[1])
    if not kept:
        increment_version(out)
    return out
