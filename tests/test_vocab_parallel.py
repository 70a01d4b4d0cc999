"""The loss of a sharded vocabulary is that of one device, on every rank."""

import pytest
import torch
from ranks import CUDA, on_ranks
from sharded import compared

OPTIONS = {
    "plain": {},
    "ignore_index": dict(ignore_index=3),
    "smoothing": dict(label_smoothing=0.1),
    "weight": dict(weight=True),
    "weight-smoothing": dict(weight=True, label_smoothing=0.3),
    "sample_weight": dict(sample_weight=True),
    "normalizer": dict(normalizer=4.5),
    "normalizer-tensor": dict(normalizer=True, sample_weight=True, weight=True),
    "z_loss-scale-cap": dict(z_loss=0.1, logit_scale=0.7, softcap=4.0),
    "inplace": dict(inplace=True),
    "stats": dict(return_stats=True),
    "all": dict(
        return_stats=True, weight=True, sample_weight=True, label_smoothing=0.1, z_loss=0.1,
        logit_scale=1.5, softcap=9.0, ignore_index=3,
    ),
}  # fmt: skip
TWO = pytest.param(2, marks=pytest.mark.slow)  # three have all that two have
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def routes(options):
    """Every reduction by every route."""
    for reduction in ("mean", "sum", "none"):
        if reduction != "mean" and options.get("normalizer"):
            continue
        for route in (None, True, False):
            yield dict(options, reduction=reduction, grad_in_forward=route)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@on_ranks(TWO, 3, backends=["cpu", CUDA])
def test_as_one_device(here, options, dtype):
    for call in routes(options):
        compared(here, False, dtype, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@on_ranks(TWO, 3, backends=["cpu", CUDA])
def test_linear_as_one_device(here, options, dtype):
    options = {name: value for name, value in options.items() if name != "inplace"}
    for number, call in enumerate(routes(options)):
        cut = dict(
            chunk_size=(None, 3, 1)[number % 3], skip_ignored=(None, True, False)[number % 3]
        )
        if dtype == torch.bfloat16:
            cut["logits_dtype"] = torch.float32
        compared(here, True, dtype, call | cut)


@pytest.mark.parametrize("name", ["weight-smoothing", "all"])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@on_ranks(2, backends=["triton"])
def test_interpreted_as_one_device(here, linear, name):
    for reduction, route in (("mean", True), ("none", False)):
        options = dict(OPTIONS[name], reduction=reduction, grad_in_forward=route)
        cut = dict(chunk_size=4) if linear else {}
        compared(here, linear, torch.float32, options | cut)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@on_ranks(2, backends=["triton"])
def test_interpreted_all_options(here, linear, options, dtype):
    if linear:
        options = {name: value for name, value in options.items() if name != "inplace"}
        options |= dict(chunk_size=3)
        if dtype == torch.bfloat16:
            options["logits_dtype"] = torch.float32
    for call in list(routes(options))[::4]:
        compared(here, linear, dtype, call)
