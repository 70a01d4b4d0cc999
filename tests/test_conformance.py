"""PyTorch's own samples of cross-entropy: what is right in its test suite is right here."""

import functools
import inspect
from unittest import mock

import pytest
import torch
from oracle import FLOATS, SEED, random_upstream
from torch.nn.functional import cross_entropy

from fused_ce import FusedCrossEntropyLoss, fused_cross_entropy

QUICK = (torch.bfloat16, torch.float32)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [  # thousands of samples: `make test` has them in the two dtypes that are trained in
        pytest.param(dtype, id=str(dtype), marks=() if dtype in QUICK else pytest.mark.slow)
        for dtype in FLOATS
    ],
)


@functools.cache
def databases():
    """(OpInfo, ModuleInfo) of cross-entropy; loaded late, it takes seconds."""
    pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
    # On import it freezes torch.backends for the process, the other tests included.
    with mock.patch("torch.backends.disable_global_flags"):
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    (op,) = [info for info in op_db if info.name == "nn.functional.cross_entropy"]
    (module,) = [info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss]
    return op, module


def samples_of_the_function(device, dtype):
    """(logits, targets, keywords) of every sample."""
    op, _ = databases()
    torch.manual_seed(SEED)
    samples = list(op.sample_inputs(device, dtype, requires_grad=True))
    return [(sample.input, *sample.args, sample.kwargs) for sample in samples]


def samples_of_the_module(device, dtype):
    """(logits, targets, arguments of the module) of every sample."""
    _, module = databases()
    torch.manual_seed(SEED)
    samples = module.module_inputs_func(module, device, dtype, requires_grad=True, training=True)
    for sample in samples:
        assert not sample.constructor_input.args and not sample.forward_input.kwargs
    return [(*sample.forward_input.args, sample.constructor_input.kwargs) for sample in samples]


def kinds(samples):
    """How many have classes and how many probabilities: both, or the samples are not torch's."""
    soft = sum(targets.is_floating_point() for _, targets, _ in samples)
    return len(samples) - soft, soft


def class_axis(logits, targets):
    """dim=1 where a reading of torch is one of two."""
    soft = targets.is_floating_point()
    ambiguous = soft or logits.shape[:-1] == targets.shape
    return {"dim": 1} if logits.dim() > 2 and ambiguous else {}


def leaves(logits, targets, dtype=None):
    """Copies that collect gradients: logits, and the targets that are probabilities."""
    copies = [tensor.detach().clone() for tensor in (logits, targets)]
    for i, copy in enumerate(copies):
        if copy.is_floating_point():
            copies[i] = copy.to(dtype or copy.dtype).requires_grad_()
    return copies


def differentiated(loss, inputs, upstream):
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))


def assert_as_torch(ours, theirs, sample):
    """Loss and gradients of `ours` are those of `theirs` in float32, float64 for float64.

    In torch's tolerance for that dtype; a gradient is rounded to the dtype of its tensor once.
    """
    logits, targets, options = sample
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    inputs, right_inputs = leaves(logits, targets), leaves(logits, targets, compute)
    loss, right = ours(*inputs), theirs(*right_inputs)
    upstream = random_upstream(right)
    where = f"{tuple(logits.shape)}, {tuple(targets.shape)} {targets.dtype}, {options}: {{}}".format
    torch.testing.assert_close(loss, right, equal_nan=True, msg=where)
    got = differentiated(loss, inputs, upstream)
    expected = differentiated(right, right_inputs, upstream)
    assert len(got) == 1 + targets.is_floating_point()
    for gradient, right_gradient in zip(got, expected, strict=True):
        assert gradient.dtype == logits.dtype
        torch.testing.assert_close(gradient, right_gradient.to(logits.dtype), msg=where)


def in_compute_dtype(options, dtype):
    """Class weights in the dtype that the logits are compared in."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: value.to(compute) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }


@DTYPES
@pytest.mark.parametrize("grad_in_forward", [None, True, False])
def test_samples_of_the_function(device, dtype, grad_in_forward):
    op, _ = databases()
    assert dtype in op.dtypes
    samples = samples_of_the_function(device, dtype)
    assert min(kinds(samples)) > 5
    for sample in samples:
        logits, targets, options = sample
        ours = functools.partial(
            fused_cross_entropy, **options, **class_axis(logits, targets),
            grad_in_forward=grad_in_forward,
        )  # fmt: skip
        theirs = functools.partial(cross_entropy, **in_compute_dtype(options, dtype))
        assert_as_torch(ours, theirs, sample)


@DTYPES
def test_samples_of_the_module(device, dtype):
    samples = samples_of_the_module(device, dtype)
    assert min(kinds(samples)) > 20
    for sample in samples:
        logits, targets, options = sample
        ours = FusedCrossEntropyLoss(**options, **class_axis(logits, targets))
        theirs = torch.nn.CrossEntropyLoss(**in_compute_dtype(options, dtype))
        assert_as_torch(ours, theirs, sample)


def test_samples_have_every_dimension_option_and_reduction():
    """So that a sample list that shrinks in a later torch does not go unnoticed."""
    pairs = samples_of_the_function("cpu", torch.float32)
    pairs += samples_of_the_module("cpu", torch.float32)
    assert {logits.dim() for logits, _, _ in pairs} >= {1, 2, 3, 4, 5, 6}
    for option in ("weight", "ignore_index", "label_smoothing"):
        assert any(option in options for _, _, options in pairs), option
    for reduction in ("mean", "sum", "none"):
        assert any(options.get("reduction") == reduction for _, _, options in pairs), reduction
    assert any(class_axis(logits, targets) for logits, targets, _ in pairs)


def test_errors_of_the_module_are_errors_here(device):
    """Of other types and words than torch's; but none of these calls gives a number."""
    _, module = databases()
    if module.module_error_inputs_func is None:
        assert torch.__version__ < (2, 12)
        pytest.skip("torch has none before 2.12")
    errors = module.module_error_inputs_func(
        module, device, torch.float32, requires_grad=True, training=True
    )
    assert len(errors) > 0
    for error in errors:
        arguments = error.module_error_input.constructor_input
        call = error.module_error_input.forward_input
        with pytest.raises((TypeError, ValueError)):
            loss = FusedCrossEntropyLoss(*arguments.args, **arguments.kwargs)
            loss(*call.args, **call.kwargs)


def test_arguments_of_torch_keep_their_names_and_defaults():
    """But for the two that torch has deprecated."""
    theirs = dict(inspect.signature(cross_entropy).parameters)
    del theirs["size_average"], theirs["reduce"]
    ours = inspect.signature(fused_cross_entropy).parameters
    names = {"input": "logits", "target": "targets"}
    for name, parameter in theirs.items():
        assert ours[names.get(name, name)].default == parameter.default, name
