"""docs/migrating.md beside the libraries themselves, those that run on a CPU, where installed."""

import inspect
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from oracle import generator, random_logits, random_targets
from ranks import on_ranks
from test_migrating import (
    N_CLASSES,
    a_head,
    of_dtypes,
    of_reductions,
    random,
    shard,
    theirs,
    tokens,
)


def check_library(ours, library, leaves):
    """The same dtype, values and gradients, up to rounding."""
    results = []
    for function in (ours, library):
        own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        result = function(*own)
        values = result.detach().clone()
        upstream = torch.randn(result.shape, generator=generator(5)).to(result.dtype)
        results.append([values, *torch.autograd.grad(result, own, upstream)])
    for a, b in zip(*results, strict=True):
        steps = 32 * max(torch.finfo(x.dtype).eps for x in (b, *leaves))
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=steps * b.abs().max().item())


@pytest.mark.skipif(not find_spec("megatron"), reason="megatron-core is not installed")
@on_ranks(1, 2, backends=("cpu",))
def test_megatron(here):
    """Smoothing on one rank alone: its ranks do not agree on the loss."""
    from megatron.core.tensor_parallel import cross_entropy as module

    module.get_tensor_model_parallel_group = lambda: dist.group.WORLD
    module.get_tensor_model_parallel_rank = lambda: here.rank
    module.get_tensor_model_parallel_world_size = lambda: here.n_ranks
    ours = theirs("Megatron", "vocab_parallel_cross_entropy")
    targets = random_targets(3, 5, classes=42)
    for dtype in (torch.float32, torch.bfloat16):
        for smoothing in (0.0, 0.1) if here.n_ranks == 1 else (0.0,):
            logits = shard(here, random_logits(3, 5, 42, dtype=dtype))
            check_library(
                lambda x, s=smoothing: ours(x, targets, s),
                lambda x, s=smoothing: module.vocab_parallel_cross_entropy(x, targets, s),
                [logits],
            )


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("part", [0, 1], ids=["loss", "lse"])
@of_dtypes
@of_reductions
def test_cut_cross_entropy(dtype, reduction, part, shift):
    """Its path for CPUs, whose logits of 16-bit operands are rounded."""
    library = pytest.importorskip("cut_cross_entropy.torch_compile")
    reason = "release 25.1.1 has neither bias nor return_lse"
    of_library = library.torch_compile_linear_cross_entropy
    if "return_lse" not in inspect.signature(of_library).parameters:
        pytest.skip(reason)
    ours = theirs("cut-cross-entropy", "linear_cross_entropy")
    targets = tokens(3, 5)
    options = dict(reduction=reduction, shift=shift, softcap=4.0, return_lse=True)
    check_library(
        lambda e, c, b: ours(e, c, targets, b, **options)[part],
        lambda e, c, b: of_library(e, c, targets, b, **options)[part],
        [*a_head(3, 5, dtype=dtype), random(N_CLASSES, dtype=dtype)],
    )


@pytest.mark.parametrize("part", [0, 1], ids=["log-probabilities", "entropy"])
def test_trl(part):
    """In float32: of bfloat16 logits its results are bfloat16 on a CPU."""
    trl = pytest.importorskip("trl.trainer.utils")
    if not hasattr(trl, "selective_log_softmax_and_entropy"):
        pytest.skip("a version before selective_log_softmax_and_entropy")
    ours = theirs("TRL", "selective_log_softmax_and_entropy")
    index, mask = random_targets(3, 5, classes=N_CLASSES), torch.ones(3, 5, dtype=torch.long)
    mask[1, :2] = 0
    options = dict(temperature=0.7, row_mask=mask)
    check_library(
        lambda x: ours(x, index, **options)[part],
        lambda x: trl.selective_log_softmax_and_entropy(x, index, **options)[part],
        [random(3, 5, N_CLASSES)],
    )
