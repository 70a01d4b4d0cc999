"""The module stands wherever nn.CrossEntropyLoss does."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from oracle import generator, random_logits, random_targets, random_weight
from torch import nn

from fused_ce import CrossEntropyStats, FusedCrossEntropyLoss, fused_cross_entropy
from fused_ce.modules import OPTIONS

CLASSES = 9
EVERY_OPTION = dict(
    ignore_index=3, label_smoothing=0.1, dim=-1, normalizer=2.5, z_loss=0.1, logit_scale=0.5,
    softcap=4.0, inplace=True, grad_in_forward=False, return_stats=True,
)  # fmt: skip


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
    module = FusedCrossEntropyLoss(random_weight(CLASSES), **EVERY_OPTION)
    twin = again(module)
    for name, value in EVERY_OPTION.items():
        assert getattr(twin, name) == value
    logits, targets = batch()
    module.inplace = twin.inplace = False
    torch.testing.assert_close(twin(logits, targets), module(logits, targets))
    assert twin.weight.data_ptr() != module.weight.data_ptr()


@pytest.mark.parametrize("again", [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda module: pickle.loads(pickle.dumps(module)), id="pickle"),
])  # fmt: skip
def test_copies_of_a_normalizer_that_is_a_tensor(again):
    module = FusedCrossEntropyLoss(normalizer=torch.tensor(7))
    twin = again(module)
    same_loss(twin, module)
    assert twin.normalizer is not module.normalizer


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


def test_every_option_of_the_function_is_one_of_the_module():
    """But for sample_weight, which belongs to a batch; with the same defaults."""
    of_function = inspect.signature(fused_cross_entropy).parameters
    of_module = inspect.signature(FusedCrossEntropyLoss.__init__).parameters
    names = set(of_function) - {"logits", "targets", "weight", "sample_weight"}
    assert names == set(OPTIONS)
    for name in names:
        assert of_module[name].default == of_function[name].default, name


def test_forward_takes_what_belongs_to_a_batch():
    """Behind torch's two, by keyword."""
    ours = list(inspect.signature(FusedCrossEntropyLoss.forward).parameters.values())
    theirs = list(inspect.signature(nn.CrossEntropyLoss.forward).parameters)
    assert [parameter.name for parameter in ours[:3]] == theirs
    assert [parameter.name for parameter in ours[3:]] == ["sample_weight", "normalizer"]
    assert all(parameter.kind == parameter.KEYWORD_ONLY for parameter in ours[3:])
    assert all(parameter.default is None for parameter in ours[3:])


@pytest.mark.parametrize("options", [
    dict(z_loss=0.3), dict(logit_scale=-0.5), dict(softcap=2.0), dict(normalizer=17.0),
    dict(reduction="none"), dict(ignore_index=3), dict(label_smoothing=0.5),
], ids=lambda options: "".join(options))  # fmt: skip
def test_each_number_reaches_the_function(device, options):
    logits, targets = batch(device)
    loss = FusedCrossEntropyLoss(**options)(logits, targets)
    torch.testing.assert_close(loss, fused_cross_entropy(logits, targets, **options))
    plain = fused_cross_entropy(logits, targets)
    assert loss.shape != plain.shape or not torch.isclose(loss, plain)


def test_stats_reach_the_caller(device):
    logits, targets = batch(device)
    loss, stats = FusedCrossEntropyLoss(return_stats=True, z_loss=0.1)(logits, targets)
    right, right_stats = fused_cross_entropy(logits, targets, return_stats=True, z_loss=0.1)
    assert isinstance(stats, CrossEntropyStats)
    torch.testing.assert_close((loss, *stats), (right, *right_stats))


def test_sample_weight_reaches_the_function_and_its_gradient_comes_back(device):
    logits, targets = batch(device)
    factors = torch.rand(5, generator=generator(0)).to(device)
    leaves = [factors.clone().requires_grad_() for _ in range(2)]
    loss = FusedCrossEntropyLoss()(logits, targets, sample_weight=leaves[0])
    right = fused_cross_entropy(logits, targets, sample_weight=leaves[1])
    torch.testing.assert_close(loss, right)
    loss.backward(), right.backward()
    assert leaves[0].grad.abs().max() > 0
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("number", [4.0, torch.tensor(4)], ids=["number", "tensor"])
def test_the_normalizer_of_a_call_comes_before_that_of_the_module(device, number):
    logits, targets = batch(device)
    number = number.to(device) if isinstance(number, torch.Tensor) else number
    module = FusedCrossEntropyLoss(normalizer=10.0)
    total = fused_cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(module(logits, targets), total / 10)
    torch.testing.assert_close(module(logits, targets, normalizer=number), total / 4)
    torch.testing.assert_close(module(logits, targets), total / 10)


def test_probabilities(device):
    logits, _ = batch(device)
    probabilities = random_logits(5, CLASSES, device=device, seed=4).softmax(dim=1)
    weight = random_weight(CLASSES, device=device)
    arguments = (weight, None, -100, None, "mean", 0.2)
    loss = FusedCrossEntropyLoss(*arguments)(logits, probabilities)
    torch.testing.assert_close(loss, nn.CrossEntropyLoss(*arguments)(logits, probabilities))


def test_inplace_and_route_reach_the_function(fused_device):
    logits, targets = batch(fused_device)
    for route in (True, False):
        leaf = logits.clone().requires_grad_()
        loss = FusedCrossEntropyLoss(inplace=True, grad_in_forward=route)(leaf, targets)
        assert (not torch.equal(leaf.detach(), logits)) == route  # who writes when
        loss.backward()
        assert leaf.grad.data_ptr() == leaf.data_ptr()


def test_gradient_in_a_model(device):
    model = nn.Linear(4, CLASSES).to(device)
    inputs, targets = random_logits(5, 4, device=device), batch(device)[1]
    FusedCrossEntropyLoss()(model(inputs), targets).backward()
    ours = model.weight.grad.clone()
    model.zero_grad()
    nn.CrossEntropyLoss()(model(inputs), targets).backward()
    torch.testing.assert_close(ours, model.weight.grad)


def test_repr_shows_the_options():
    text = repr(FusedCrossEntropyLoss(reduction="sum", **(EVERY_OPTION | dict(normalizer=None))))
    for word in (
        "FusedCrossEntropyLoss", "ignore_index=3", "'sum'", "label_smoothing=0.1", "z_loss=0.1",
        "logit_scale=0.5", "softcap=4.0", "return_stats=True", "normalizer=None",
    ):  # fmt: skip
        assert word in text


@pytest.mark.parametrize("options, word", [
    (dict(reduction="average"), "average"), (dict(label_smoothing=2.0), "2.0"),
    (dict(z_loss=float("nan")), "z_loss"), (dict(softcap=-1.0), "softcap"),
    (dict(logit_scale=float("inf")), "logit_scale"), (dict(normalizer=0), "normalizer"),
    (dict(normalizer=3, reduction="sum"), "normalizer"),
])  # fmt: skip
def test_bad_options_raise_when_the_module_is_made(options, word):
    with pytest.raises(ValueError, match=word):
        FusedCrossEntropyLoss(**options)


def test_bad_attributes_raise_when_the_module_is_called():
    module = FusedCrossEntropyLoss()
    module.softcap = -1.0
    with pytest.raises(ValueError, match="softcap"):
        module(*batch())


def test_the_first_argument_is_the_weight():
    """Other libraries begin with ignore_index."""
    with pytest.raises(TypeError, match="weight must be .* got -1; .* ignore_index=-1"):
        FusedCrossEntropyLoss(-1)
    with pytest.raises(TypeError, match=r"weight must be .* got \[1.0\]$"):
        FusedCrossEntropyLoss([1.0])


def test_options_that_are_no_numbers_raise_when_the_module_is_made():
    for name in ("z_loss", "logit_scale", "softcap", "normalizer", "return_stats"):
        with pytest.raises(TypeError, match=name):
            FusedCrossEntropyLoss(**{name: "1"})
