"""The module stands wherever nn.CrossEntropyLoss does."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from oracle import random_logits, random_targets, random_weight
from torch import nn

from fused_ce import FusedCrossEntropyLoss

CLASSES = 9


def batch(device="cpu"):
    targets = random_targets(5, classes=CLASSES, device=device)
    targets[1] = 3
    return random_logits(5, CLASSES, device=device), targets


def same_loss(module, original):
    logits, targets = batch()
    torch.testing.assert_close(module(logits, targets), original(logits, targets))


def test_arguments_of_the_original_come_first_and_in_its_order():
    ours = list(inspect.signature(FusedCrossEntropyLoss.__init__).parameters.values())
    theirs = list(inspect.signature(nn.CrossEntropyLoss.__init__).parameters.values())
    for mine, original in zip(ours, theirs, strict=False):
        assert mine.name == original.name
        assert mine.default == original.default
    assert len(ours) > len(theirs)
    assert all(extra.kind == extra.KEYWORD_ONLY for extra in ours[len(theirs) :])


@pytest.mark.parametrize("arguments", [
    (), (random_weight(CLASSES),), (None, None, 3), (None, None, -100, None, "sum"),
    (random_weight(CLASSES), None, 3, None, "none", 0.2),
], ids=len)  # fmt: skip
def test_positional_arguments(arguments):
    same_loss(FusedCrossEntropyLoss(*arguments), nn.CrossEntropyLoss(*arguments))


@pytest.mark.parametrize(
    "size_average, reduce",
    [(False, None), (True, None), (None, False), (None, True), (False, False), (True, True)],
)
def test_deprecated_arguments(size_average, reduce):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = dict(size_average=size_average, reduce=reduce)
        same_loss(FusedCrossEntropyLoss(**arguments), nn.CrossEntropyLoss(**arguments))


def test_it_is_a_cross_entropy_loss():
    assert isinstance(FusedCrossEntropyLoss(), nn.CrossEntropyLoss)


@pytest.mark.parametrize("again", [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda module: pickle.loads(pickle.dumps(module)), id="pickle"),
])  # fmt: skip
def test_copies(again):
    module = FusedCrossEntropyLoss(
        random_weight(CLASSES), ignore_index=3, label_smoothing=0.1, dim=-1, inplace=True,
        grad_in_forward=False,
    )  # fmt: skip
    twin = again(module)
    same_loss(twin, module)
    for name in ("dim", "inplace", "grad_in_forward", "ignore_index", "label_smoothing"):
        assert getattr(twin, name) == getattr(module, name)
    assert twin.weight.data_ptr() != module.weight.data_ptr()


def test_whole_module_through_torch_save():
    module, file = FusedCrossEntropyLoss(random_weight(CLASSES)), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    same_loss(torch.load(file, weights_only=False), module)


def test_state_dict_is_that_of_the_original():
    weight = random_weight(CLASSES)
    original = nn.CrossEntropyLoss(weight)
    module = FusedCrossEntropyLoss(torch.ones(CLASSES))
    module.load_state_dict(original.state_dict())
    assert module.state_dict().keys() == original.state_dict().keys()
    same_loss(module, original)
    assert not FusedCrossEntropyLoss().state_dict()
    assert not list(module.parameters())


def test_weight_moves_with_the_module():
    module = FusedCrossEntropyLoss(random_weight(CLASSES)).to(torch.float64)
    assert module.weight.dtype == torch.float64
    assert module.to("meta").weight.device.type == "meta"


def test_attributes_may_change_later():
    module, original = FusedCrossEntropyLoss(), nn.CrossEntropyLoss()
    for loss in (module, original):
        loss.reduction, loss.ignore_index, loss.label_smoothing = "none", 3, 0.3
        loss.weight = random_weight(CLASSES)
    same_loss(module, original)


def test_options_reach_the_function(device):
    logits, targets = random_logits(3, 3, 3, device=device), random_targets(3, 3, classes=3)
    targets = targets.to(device)
    first, last = FusedCrossEntropyLoss(dim=1), FusedCrossEntropyLoss(dim=-1)
    torch.testing.assert_close(first(logits, targets), last(logits.transpose(1, 2), targets))
    with pytest.raises(ValueError, match="dim=1 or dim=-1"):
        FusedCrossEntropyLoss()(logits, targets)


def test_inplace_and_route_reach_the_function(fused_device):
    logits, targets = batch(fused_device)
    for route in (True, False):
        leaf = logits.clone().requires_grad_()
        loss = FusedCrossEntropyLoss(inplace=True, grad_in_forward=route)(leaf, targets)
        assert (not torch.equal(leaf.detach(), logits)) == route  # who writes when
        loss.backward()
        assert leaf.grad.data_ptr() == leaf.data_ptr()


def test_gradient_in_a_model(device):
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES).to(device)
    inputs, targets = random_logits(5, 4, device=device), batch(device)[1]
    FusedCrossEntropyLoss()(model(inputs), targets).backward()
    ours = model.weight.grad.clone()
    model.zero_grad()
    nn.CrossEntropyLoss()(model(inputs), targets).backward()
    torch.testing.assert_close(ours, model.weight.grad)


def test_repr_shows_the_options():
    text = repr(FusedCrossEntropyLoss(ignore_index=3, reduction="sum", label_smoothing=0.1))
    for word in ("FusedCrossEntropyLoss", "ignore_index=3", "'sum'", "label_smoothing=0.1"):
        assert word in text


@pytest.mark.parametrize("options, word", [(dict(reduction="average"), "average"),
                                           (dict(label_smoothing=2.0), "2.0")])  # fmt: skip
def test_bad_options_raise(options, word):
    with pytest.raises(ValueError, match=word):
        FusedCrossEntropyLoss(**options)(*batch())
