"""Whoever looks on sees one function: jit traces, fx, function modes, subclasses of Tensor."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import random_logits, random_targets, random_weight
from torch.overrides import TorchFunctionMode

from fused_ce import (
    CrossEntropyStats,
    FusedCrossEntropyLoss,
    fused_cross_entropy,
    reference_cross_entropy,
)

V = 65


def batch(n_rows, device, vocab_size=V, dtype=torch.float32):
    logits = random_logits(n_rows, vocab_size, device=device, dtype=dtype)
    return logits, random_targets(n_rows, classes=vocab_size, device=device)


def traced(function, *examples):
    """Without a warning of the tracer: each stands for a constant where a value should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return torch.jit.trace(function, examples)


class TestJitTrace:
    def test_other_numbers_of_rows(self, device):
        """The divisor of a mean is that of each call."""
        trace = traced(lambda x, y: fused_cross_entropy(x, y), *batch(4, device))
        for n_rows in (8, 1):
            logits, targets = batch(n_rows, device)
            torch.testing.assert_close(trace(logits, targets), F.cross_entropy(logits, targets))

    def test_other_ignored_rows(self, device):
        """In loss and gradient; logits of ignored rows may hold anything."""
        logits, targets = batch(4, device)
        targets[1] = -100
        trace = traced(lambda x, y: fused_cross_entropy(x, y, label_smoothing=0.1), logits, targets)
        targets[2] = -100
        right = logits.clone().requires_grad_()
        F.cross_entropy(right, targets, label_smoothing=0.1).backward()
        logits[1], logits[2] = torch.nan, torch.inf
        leaf = logits.requires_grad_()
        trace(leaf, targets).backward()
        torch.testing.assert_close(leaf.grad, right.grad)

    def test_traced_with_logits_that_need_a_gradient(self, device):
        logits, targets = batch(4, device)
        trace = traced(
            lambda x, y: fused_cross_entropy(x, y), logits.clone().requires_grad_(), targets
        )
        leaf = logits.requires_grad_()
        trace(leaf, targets).backward()
        right = logits.detach().requires_grad_()
        F.cross_entropy(right, targets).backward()
        torch.testing.assert_close(leaf.grad, right.grad)

    @pytest.mark.parametrize("function", [fused_cross_entropy, reference_cross_entropy])
    @pytest.mark.parametrize("kind", ["classes", "probabilities"])
    def test_every_option(self, device, function, kind):
        """Traced with other sizes of every axis, the vocabulary too."""

        def call(logits, targets, weight, sample_weight, normalizer):
            return function(
                logits, targets, weight, sample_weight=sample_weight, normalizer=normalizer, dim=1,
                label_smoothing=0.1, z_loss=0.1, logit_scale=1.5, softcap=4.0, return_stats=True,
            )  # fmt: skip

        def arguments(n, c, d):
            logits = random_logits(n, c, d, device=device, dtype=torch.float64)
            targets = random_targets(n, d, classes=c, device=device)
            if kind == "probabilities":
                targets = logits.cos().softmax(1)
            sample_weight = torch.rand(n, d, device=device)
            normalizer = torch.tensor(7.0 * n, device=device)
            return logits, targets, random_weight(c, device=device), sample_weight, normalizer

        trace = traced(call, *arguments(2, 5, 3))
        given = arguments(4, 7, 6)
        torch.testing.assert_close(trace(*given), call(*given), rtol=1e-12, atol=1e-12)

    def test_another_ignored_class(self, device):
        """A tensor is an argument of each call, a number is one of the trace."""
        logits, targets = batch(9, device)

        def call(x, y, ignored):
            return fused_cross_entropy(x, y, ignore_index=ignored)

        trace = traced(call, logits, targets, torch.tensor(-100))
        for ignored in targets[:3].cpu():
            right = F.cross_entropy(logits, targets, ignore_index=int(ignored))
            torch.testing.assert_close(trace(logits, targets, ignored), right)
            torch.testing.assert_close(trace(logits, targets, ignored[None]), right)

    @pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_shapes(self, device, shape, reduction):
        logits = random_logits(*shape, device=device)
        targets = random_targets(*shape[:-1], classes=5, device=device)
        trace = traced(lambda x, y: fused_cross_entropy(x, y, reduction=reduction), logits, targets)
        if len(shape) > 1:
            logits, targets = logits.repeat(2, *[1] * (len(shape) - 1)), torch.cat([targets] * 2)
        right = fused_cross_entropy(logits, targets, reduction=reduction)
        torch.testing.assert_close(trace(logits, targets), right)

    def test_module(self, device):
        module = FusedCrossEntropyLoss(random_weight(V, device=device), ignore_index=3)
        trace = traced(module, *batch(4, device))
        logits, targets = batch(9, device)
        torch.testing.assert_close(trace(logits, targets), module(logits, targets))

    def test_frozen_and_saved_in_a_model(self, device):
        """The class weights are a buffer of the trace, as of the model."""
        model = Model().to(device).eval()
        hidden = torch.randn(9, 8, device=device)
        trace = traced(model, hidden[:4], random_targets(4, classes=V, device=device))
        file = io.BytesIO()
        torch.jit.save(trace, file)
        file.seek(0)
        targets = random_targets(9, classes=V, device=device)
        for again in (torch.jit.load(file), torch.jit.freeze(trace)):
            torch.testing.assert_close(again(hidden, targets), model(hidden, targets))
        model.loss.weight.fill_(1.0)[targets[0]] = 5.0
        torch.testing.assert_close(trace(hidden, targets), model(hidden, targets))

    def test_later_targets_out_of_range_poison_their_row(self, device):
        logits, targets = batch(4, device)
        trace = traced(lambda x, y: fused_cross_entropy(x, y, reduction="none"), logits, targets)
        targets[2] = V
        assert trace(logits, targets).isnan().tolist() == [False, False, True, False]

    def test_wrong_arguments_are_refused_as_ever(self, host_device):
        logits, targets = batch(4, host_device)
        targets[2] = V
        with pytest.raises(IndexError, match="row 2"):
            traced(lambda x, y: fused_cross_entropy(x, y), logits, targets)
        with pytest.raises(ValueError, match="need targets"):
            traced(lambda x, y: fused_cross_entropy(x, y[:2]), logits, targets)
        with pytest.raises(ValueError, match="at least one class"):
            traced(lambda x, y: fused_cross_entropy(x, y), logits[:0, :0], targets[:0])

    def test_script_is_refused_by_name(self):
        with pytest.raises(RuntimeError, match="torch.jit.script cannot compile FusedCrossEntropy"):
            torch.jit.script(torch.nn.Sequential(FusedCrossEntropyLoss()))


class Model(torch.nn.Module):
    def __init__(self):  # noqa: D107
        super().__init__()
        self.head = torch.nn.Linear(8, V)
        self.loss = FusedCrossEntropyLoss(random_weight(V), label_smoothing=0.1)

    def forward(self, hidden, targets):
        logits = self.head(hidden)
        return self.loss(logits, targets) + fused_cross_entropy(logits, targets, z_loss=0.1)


def test_fx_traces_one_function():
    model = Model()
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(fused_cross_entropy) == 2
    for again in (graph, copy.deepcopy(graph), torch.fx.symbolic_trace(graph)):
        for n_rows in (3, 5):
            hidden, targets = torch.randn(n_rows, 8), random_targets(n_rows, classes=V)
            assert torch.equal(again(hidden, targets), model(hidden, targets))


def test_modes_of_functions_see_one_call(device):
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append((function, kwargs))
            return function(*args, **(kwargs or {}))

    logits, targets = batch(3, device)
    with Recorder():
        loss, stats = fused_cross_entropy(logits, targets, reduction="sum", return_stats=True)
    assert [function for function, _ in seen] == [fused_cross_entropy]
    assert seen[0][1]["reduction"] == "sum"
    assert isinstance(stats, CrossEntropyStats)
    assert torch.equal(loss, fused_cross_entropy(logits, targets, reduction="sum"))


@pytest.mark.parametrize("name", ["logits", "targets", "weight", "sample_weight", "normalizer"])
def test_classes_with_a_torch_function_answer_for_themselves(name):
    class Answer:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, args, kwargs

    logits, targets = batch(3, "cpu")
    given = {"logits": logits, "targets": targets, name: Answer()}
    function, args, kwargs = fused_cross_entropy(**given, z_loss=0.5)
    assert function is fused_cross_entropy and kwargs["z_loss"] == 0.5
    assert any(isinstance(value, Answer) for value in (*args, *kwargs.values()))


class Named(torch.Tensor):
    """As torch's users have them: nothing but a name."""


class Logged(torch.Tensor):
    seen = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # noqa: D105
        cls.seen.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("kind", [Named, Logged], ids=["plain", "with-its-own-function"])
@pytest.mark.parametrize("which", ["logits", "targets"])
def test_subclasses_get_their_type_back(device, kind, which):
    given = dict(zip(("logits", "targets"), batch(3, device), strict=True))
    right = fused_cross_entropy(**given)
    given[which] = given[which].as_subclass(kind)
    Logged.seen.clear()
    loss = fused_cross_entropy(**given)
    assert type(loss) is type(F.cross_entropy(*given.values())) is kind
    assert torch.equal(loss.as_subclass(torch.Tensor), right)
    assert kind is Named or Logged.seen[0] == "fused_cross_entropy"


@pytest.mark.parametrize("kind", [Named, Logged], ids=["plain", "with-its-own-function"])
def test_stats_of_a_subclass(device, kind):
    logits, targets = batch(3, device)
    leaf = logits.as_subclass(kind).requires_grad_()
    loss, stats = fused_cross_entropy(leaf, targets, return_stats=True)
    assert type(loss) is kind and isinstance(stats, CrossEntropyStats)
    assert all(type(stat) is kind for stat in stats)
    (loss + stats.lse.sum()).backward()
    plain = logits.detach().requires_grad_()
    loss, stats = fused_cross_entropy(plain, targets, return_stats=True)
    (loss + stats.lse.sum()).backward()
    assert torch.equal(leaf.grad.as_subclass(torch.Tensor), plain.grad)
