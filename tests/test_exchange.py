"""What ranks tell each other: how much, how often, and what becomes of those who disagree."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from oracle import random_logits, random_targets, random_upstream
from ranks import CUDA, Ranks, on_ranks
from sharded import (
    N_ROWS,
    classes_of,
    compared,
    leaf,
    some_head,
    some_logits,
    some_targets,
)
from test_cpu import peak_memory
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ce import (
    exchange,
    fused_cross_entropy,
    reference_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

HEADER_BYTES = 20  # of float32 numbers


class Watched(TorchDispatchMode):
    """(name, bytes sent) of every collective."""

    def __init__(self):
        """None yet."""
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Any operator's."""
        if function.namespace == "c10d":
            name, *_ = function.name().removeprefix("c10d::").split(".")
            sent = args[0] if name.startswith("allreduce") else args[1]
            sent = sent[0] if isinstance(sent, list | tuple) else sent
            self.seen.append((name.strip("_"), sent.numel() * sent.element_size()))
        return function(*args, **(kwargs or {}))


def shards(here, **kind):
    """(logits, hidden, weight) of this rank, leaves; the targets."""
    mine = classes_of(here)
    logits = leaf(some_logits(dtype=torch.float32, device=here.device)[:, mine])
    hidden, weight, _ = some_head(torch.float32, here.device)
    return logits, leaf(hidden), leaf(weight[mine]), some_targets(device=here.device)


# Numbers a row that travel.
@pytest.mark.parametrize("options, numbers", [
    ({}, 3), (dict(label_smoothing=0.1, z_loss=0.1, inplace=False), 3), (dict(weight=True), 4),
    (dict(return_stats=True), 5), (dict(return_stats=True, weight=True, label_smoothing=0.1), 6),
], ids=str)  # fmt: skip
@on_ranks(2)
def test_one_all_gather(here, options, numbers):
    logits, hidden, weight, targets = shards(here)
    options = dict(options)
    if options.get("weight"):
        options["weight"] = torch.full((logits.shape[1],), 0.5, device=here.device)
    vocab_parallel_cross_entropy(logits, targets, **options)  # sizes are learned
    for route in (True, False):
        with Watched() as watched:
            found = vocab_parallel_cross_entropy(logits, targets, grad_in_forward=route, **options)
            loss = found[0] + found[1].lse.sum() if options.get("return_stats") else found
            loss.backward()
        assert watched.seen == [("allgather_base", HEADER_BYTES + 4 * numbers * N_ROWS)]


@on_ranks(2)
def test_float64_is_all_that_travels_wider(here):
    logits, *_, targets = shards(here)
    for dtype, factor in ((torch.bfloat16, 1), (torch.float16, 1), (torch.float64, 2)):
        vocab_parallel_cross_entropy(logits.to(dtype), targets)
        with Watched() as watched:
            vocab_parallel_cross_entropy(logits.to(dtype), targets)
        assert watched.seen == [("allgather_base", factor * (HEADER_BYTES + 12 * N_ROWS))]


@on_ranks(2)
def test_one_all_gather_a_chunk(here):
    _, hidden, weight, targets = shards(here)
    call = dict(chunk_size=3, skip_ignored=False)
    vocab_parallel_linear_cross_entropy(hidden, weight, targets, **call)
    gathers = [("allgather_base", HEADER_BYTES + 12 * n) for n in (3, 3, 1)]
    of_hidden = [("allreduce", 4 * hidden.numel())]
    for route in (True, False):
        for reduces in (True, False):
            with Watched() as watched:
                vocab_parallel_linear_cross_entropy(
                    hidden, weight, targets, grad_in_forward=route, reduce_hidden_grad=reduces,
                    **call,
                ).backward()  # fmt: skip
            assert watched.seen == gathers + of_hidden * reduces
    with Watched() as watched, torch.no_grad():
        vocab_parallel_linear_cross_entropy(hidden, weight, targets, **call)
    assert watched.seen == gathers
    with Watched() as watched:  # the mean's divisor, once
        vocab_parallel_linear_cross_entropy(
            hidden.detach(), weight, targets, weight=torch.ones_like(weight[:, 0].detach()), **call
        )
    divisor = [("allgather_base", 4)]
    assert sorted(watched.seen) == sorted(
        divisor + [("allgather_base", HEADER_BYTES + 16 * n) for n in (3, 3, 1)]
    )


@pytest.mark.parametrize("route, limit", [(True, 1.15), (False, 1.15), (None, 0.15)], ids=str)
@on_ranks(2, backends=["cpu"])
def test_nothing_as_large_as_the_logits(here, route, limit):
    """But their gradient."""
    logits, targets = random_logits(3000, 4000), random_targets(3000, classes=8000)
    logits.requires_grad_(route is not None)

    def step():
        loss = vocab_parallel_cross_entropy(logits, targets, grad_in_forward=route)
        if route is not None:
            torch.autograd.grad(loss, logits)

    assert peak_memory(step) <= limit * logits.numel() * 4


@on_ranks(2, backends=["cpu", CUDA])
def test_heads_of_equal_size_here_and_other_sizes_elsewhere(here):
    """They alternate: on a CPU the first exchange finds out, on a GPU the sizes are given."""
    for step in range(4):
        sizes = ((11, 22), (11, 9), (13, 9))[step % 3]
        bounds = [0, sizes[0], sum(sizes)]
        mine = slice(*bounds[here.rank : here.rank + 2])
        values = random_logits(N_ROWS, sum(sizes), device=here.device, seed=step)
        targets = some_targets(sum(sizes), device=here.device)
        shard, whole = leaf(values[:, mine]), leaf(values)
        given = None if here.on_host else sizes
        call = dict(label_smoothing=0.1, return_stats=True, reduction="none")
        loss, stats = vocab_parallel_cross_entropy(shard, targets, shard_sizes=given, **call)
        right, right_stats = reference_cross_entropy(whole, targets, **call)
        torch.testing.assert_close(loss, right)
        assert torch.equal(stats.predictions, right_stats.predictions)
        upstream = random_upstream(loss)
        (grad,) = torch.autograd.grad(loss, shard, upstream)
        (right_grad,) = torch.autograd.grad(right, whole, upstream)
        torch.testing.assert_close(grad, right_grad[:, mine])


@on_ranks(2, backends=["triton", CUDA])
def test_sizes_that_changed_are_nan_where_the_host_does_not_look(here):
    """Of two ranks that both know sizes for their own, and the wrong ones of the other."""
    for sizes in ((11, 22), (9, 10)):
        shard = torch.zeros(N_ROWS, sizes[here.rank], device=here.device)
        vocab_parallel_cross_entropy(shard, some_targets(5, device=here.device))
    shard = torch.zeros(N_ROWS, (11, 10)[here.rank], device=here.device).requires_grad_()
    losses = vocab_parallel_cross_entropy(
        shard, some_targets(5, device=here.device), reduction="none"
    )
    assert losses.isnan().tolist() == [row != 2 for row in range(N_ROWS)]
    (grad,) = torch.autograd.grad(losses.sum(), shard)
    assert grad[[0, 1, 3]].isnan().all() and (grad[2] == 0).all()


@on_ranks(2, backends=["triton", CUDA])
def test_a_rank_that_learns_finds_one_that_knows_otherwise(here):
    for sizes in ((11, 22), (11, 9)):
        shard = torch.zeros(N_ROWS, sizes[here.rank], device=here.device)
        targets = some_targets(5, device=here.device)
        if sizes[1] == 9 and here.rank == 1:
            with pytest.raises(RuntimeError, match=r"ranks have \(11, 9\) classes.*shard_sizes"):
                vocab_parallel_cross_entropy(shard, targets)
            return
        loss = vocab_parallel_cross_entropy(shard, targets)
        assert loss.isnan() == (sizes[1] == 9)


@on_ranks(2)
def test_sizes_given(here):
    sizes, (logits, hidden, weight, targets) = (21, 12), shards(here)
    with Watched() as watched:
        loss = vocab_parallel_cross_entropy(logits, targets, shard_sizes=sizes)
    assert len(watched.seen) == 1  # at the first call too
    right = vocab_parallel_cross_entropy(logits, targets)
    torch.testing.assert_close(loss, right)
    for wrong in ((21,), (21, 12, 0), (12, 21), (34, -1)):
        with pytest.raises(ValueError, match="shard_sizes must have 2 sizes"):
            vocab_parallel_cross_entropy(logits, targets, shard_sizes=wrong)
    own = (21, 13) if here.rank == 0 else (21, 12)
    if here.on_host:
        with pytest.raises(RuntimeError, match=r"ranks have \(21, 12\) classes, but some took it"):
            vocab_parallel_cross_entropy(logits, targets, shard_sizes=own)
        with pytest.raises(RuntimeError, match=r"ranks have \(21, 12\) classes"):
            vocab_parallel_linear_cross_entropy(hidden, weight, targets, shard_sizes=own)
    else:
        assert vocab_parallel_cross_entropy(logits, targets, shard_sizes=own).isnan()


@on_ranks(2)
def test_a_part_of_the_gradient_of_hidden(here):
    _, hidden, weight, targets = shards(here)
    for route in (True, False):
        grads = []
        for reduces in (True, False):
            loss = vocab_parallel_linear_cross_entropy(
                hidden, weight, targets, reduce_hidden_grad=reduces, grad_in_forward=route
            )
            grads.append(torch.autograd.grad(loss, hidden)[0])
        whole, part = grads
        assert not torch.allclose(whole, part)
        dist.all_reduce(part)
        torch.testing.assert_close(whole, part)


@on_ranks(2, backends=["cpu", CUDA])
def test_the_gradient_of_hidden_is_summed_before_it_is_rounded(here):
    """Parts that cancel but for what bfloat16 would lose."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, device=here.device).requires_grad_()
    weight = torch.full((1, 1), 1.0, dtype=torch.bfloat16, device=here.device)
    if here.rank == 1:
        weight *= 1.015625
    target = torch.tensor([here.rank * 0], device=here.device)
    with Watched() as watched:
        loss = vocab_parallel_linear_cross_entropy(
            hidden, weight, target, logits_dtype=torch.float32
        )
    assert watched.seen[-1] == ("allreduce", 4)
    whole = torch.tensor([[1.0], [1.015625]]).double()
    p = (whole[:, 0]).softmax(0)
    right = (p[1] * (whole[1] - whole[0])).item()
    (grad,) = torch.autograd.grad(loss, hidden)
    assert abs(grad.item() - right) <= 2**-7 * right


@on_ranks(3, backends=["cpu", CUDA])
def test_a_group_of_some_ranks(here):
    group = dist.new_group([0, 2])
    if here.rank == 1:
        with pytest.raises(TypeError, match="group must be a ProcessGroup or None"):
            vocab_parallel_cross_entropy(torch.ones(1, 1), torch.tensor([0]), group=group)
        return
    member = here._replace(rank=here.rank // 2, n_ranks=2)
    for linear in (False, True):
        options = dict(label_smoothing=0.1, return_stats=True, weight=True)
        compared(member, linear, torch.float32, options, group=group)
    dist.destroy_process_group(group)


CHANGES = {
    "number-of-rows": ("shape", lambda x, t, o: (x[:5], t[:5], o)),
    "dtype": ("dtype", lambda x, t, o: (x.double(), t, o)),
    "reduction": ("reduction", lambda x, t, o: (x, t, dict(o, reduction="sum"))),
    "smoothing": ("label_smoothing", lambda x, t, o: (x, t, dict(o, label_smoothing=0.3))),
    "stats": ("return_stats", lambda x, t, o: (x, t, dict(o, return_stats=True))),
    "targets": ("targets", lambda x, t, o: (x, t.flip(0), o)),
    "weight": ("weight", lambda x, t, o: (x, t, dict(o, weight=torch.ones_like(x[0])))),
    "ignore_index": ("ignore_index", lambda x, t, o: (x, t, dict(o, ignore_index=-1))),
    "normalizer": ("normalizer", lambda x, t, o: (x, t, dict(o, normalizer=3.0))),
    "normalizer-tensor": (
        "normalizer", lambda x, t, o: (x, t, dict(o, normalizer=torch.tensor(3.0).to(x.device)))
    ),
    "sample_weight": (
        "sample_weight", lambda x, t, o: (x, t, dict(o, sample_weight=torch.ones_like(x[:, 0])))
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@on_ranks(2, backends=["cpu", "triton"])
def test_disagreement_is_named_on_all_ranks(here, change):
    """Under FUSED_CE_DEBUG=1, before anybody waits."""
    name, changed = CHANGES[change]
    logits, hidden, weight, targets = shards(here)
    logits, targets, options = logits.detach(), targets, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_CE_DEBUG", "1")
        right = vocab_parallel_cross_entropy(logits, targets)  # nothing is wrong
        assert torch.equal(right, vocab_parallel_cross_entropy(logits, targets))
        if here.rank == 1:
            logits, targets, options = changed(logits, targets, options)
        with pytest.raises(ValueError, match=f"ranks disagree, in rank order:.*{name} "):
            vocab_parallel_cross_entropy(logits, targets, **options)


@pytest.mark.parametrize("name, value", [
    ("chunk_size", 3), ("skip_ignored", False), ("reduce_hidden_grad", False),
    ("logits_dtype", torch.float32), ("needs_grad", None), ("logit_scale", 2.0),
], ids=str)  # fmt: skip
@on_ranks(2, backends=["cpu"])
def test_disagreement_of_the_linear_form(here, name, value):
    _, hidden, weight, targets = shards(here)
    hidden, weight = (leaf(tensor.bfloat16()) for tensor in (hidden, weight))
    call = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_CE_DEBUG", "1")
        vocab_parallel_linear_cross_entropy(hidden, weight, targets)
        if here.rank == 0 and name == "needs_grad":
            hidden = hidden.detach()
        elif here.rank == 0:
            call[name] = value
        with pytest.raises(ValueError, match=f"ranks disagree, in rank order:.*{name} "):
            vocab_parallel_linear_cross_entropy(hidden, weight, targets, **call)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@on_ranks(2)
def test_without_debug_nobody_reads_the_targets_for_it(here, linear):
    """On a GPU that would stop the host."""
    logits, hidden, weight, targets = shards(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.zlib, "crc32", lambda *args: pytest.fail("a digest was made"))
        if linear:
            vocab_parallel_linear_cross_entropy(hidden, weight, targets)
        else:
            vocab_parallel_cross_entropy(logits, targets)


@on_ranks(2, backends=["cpu"])
def test_a_rank_that_does_not_call(here):
    """The others get an error after the group's own time."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    logits, *_, targets = shards(here)
    if here.rank == 0:
        begun = time.monotonic()
        with pytest.raises(RuntimeError):
            vocab_parallel_cross_entropy(logits, targets, group=group)
        assert time.monotonic() - begun < 15
    else:
        time.sleep(3)


def _ends(here):
    """The body of ranks of which one dies."""
    if here.rank == 1:
        os._exit(1)
    logits, *_, targets = shards(here)
    with pytest.raises(RuntimeError):
        vocab_parallel_cross_entropy(logits, targets)


_ends.body = _ends


def test_a_rank_that_dies(tmp_path):
    """The others do not wait for it."""
    ranks = Ranks(2, "gloo", tmp_path)
    try:
        said = ranks.run(__name__, "_ends", "cpu", {})
    finally:
        ranks.end()
    assert said == [None, "the process has ended"]


@pytest.mark.parametrize("route", [True, False], ids=["in-forward", "in-backward"])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@on_ranks(2)
def test_a_graph_that_is_kept(here, linear, route):
    """Backward twice, and from stats between."""
    logits, hidden, weight, targets = shards(here)
    call = dict(grad_in_forward=route, return_stats=True)
    leaves = (hidden, weight) if linear else (logits,)
    if linear:
        loss, stats = vocab_parallel_linear_cross_entropy(
            hidden, weight, targets, chunk_size=3, **call
        )
    else:
        loss, stats = vocab_parallel_cross_entropy(logits, targets, **call)
    once, twice, both = (
        torch.autograd.grad(of, leaves, retain_graph=True)
        for of in (loss, 2 * loss, 3 * loss + stats.lse.sum())
    )
    of_lse = torch.autograd.grad(stats.lse.sum(), leaves)
    for a, b, c, d in zip(once, twice, both, of_lse, strict=True):
        torch.testing.assert_close(b, 2 * a)
        torch.testing.assert_close(c, 3 * a + d)


@on_ranks(2, backends=["cpu", CUDA])
def test_what_the_user_changes_in_place_changes_no_gradient(here):
    logits, *_, targets = shards(here)
    factors = torch.rand(N_ROWS, generator=torch.Generator().manual_seed(1)).to(here.device)
    factors.requires_grad_()
    found = []
    for changes in (False, True):
        loss, stats = vocab_parallel_cross_entropy(
            logits, targets, return_stats=True, sample_weight=factors, grad_in_forward=False
        )
        total = loss * 2 + stats.entropy.sum()
        if changes:
            for tensor in (loss, *stats):
                tensor.detach().zero_()
        found.append(torch.autograd.grad(total, (logits, factors)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@on_ranks(2, backends=["cpu", CUDA])
def test_what_it_is_not_for(here, linear):
    logits, hidden, weight, targets = shards(here)

    def call(x, targets=targets, **options):
        if linear:
            return vocab_parallel_linear_cross_entropy(x, weight, targets, **options)
        return vocab_parallel_cross_entropy(x, targets, **options)

    x = hidden if linear else logits
    for route in (True, False):
        loss = call(x, grad_in_forward=route, reduction="none")
        with pytest.raises(RuntimeError, match="differentiated once: not with create_graph"):
            torch.autograd.grad(loss.sum(), x, create_graph=True)
        ones = torch.eye(N_ROWS, device=here.device)
        with pytest.raises(RuntimeError, match="batched gradients"):
            torch.autograd.grad(call(x, reduction="none"), x, ones, is_grads_batched=True)
    with pytest.raises(RuntimeError, match="not by torch.func"):
        torch.func.grad(call)(x.detach())
    with pytest.raises(RuntimeError, match="not by torch.func"):
        torch.func.vmap(call)(x.detach()[None])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            call(dual)
    probabilities = torch.ones(N_ROWS, logits.shape[1], device=here.device)
    with pytest.raises(TypeError, match="must be class indices where the vocabulary is sharded"):
        call(x, probabilities)


@on_ranks(2, backends=["cpu", CUDA])
def test_compiled(here):
    """The graph breaks, the numbers are right."""
    logits, hidden, weight, targets = shards(here)

    def model(x, w):
        loss = vocab_parallel_cross_entropy(x * 2, targets) * 3
        return loss + vocab_parallel_linear_cross_entropy(hidden + 1, w, targets, chunk_size=4)

    found = []
    for function in (model, torch.compile(model, backend="aot_eager")):
        loss = function(logits, weight)
        found.append((loss.detach(), *torch.autograd.grad(loss, (logits, weight, hidden))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("group", ["world", 3], ids=str)
def test_what_is_no_group(group):
    with pytest.raises(TypeError, match=f"ProcessGroup or None, got {type(group).__name__}"):
        vocab_parallel_cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), group=group)


def test_without_processes():
    with pytest.raises(RuntimeError, match="init_process_group.*fused_cross_entropy"):
        vocab_parallel_cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="init_process_group.*fused_cross_entropy"):
        vocab_parallel_linear_cross_entropy(
            torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
        )


@on_ranks(1, backends=["cpu", "triton", CUDA])
def test_one_rank_alone(here):
    logits = leaf(some_logits(dtype=torch.float32, device=here.device))
    targets = some_targets(device=here.device)
    for function in (vocab_parallel_cross_entropy, fused_cross_entropy):
        loss = function(logits, targets)
        torch.testing.assert_close(loss, reference_cross_entropy(logits, targets))
