"""What a call launches: kernels, and nothing of PyTorch's own."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from fused_ce import fused_cross_entropy  # noqa: E402
from fused_ce.kernels import dispatch  # noqa: E402
from fused_ce.row_losses import RowLosses  # noqa: E402

FREE = ("empty", "new_empty", "empty_like", "detach", "view", "unsqueeze", "squeeze", "select")


def operations(others):
    """A mode that collects the names of operations that do more than allocate or look at memory."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function.overloadpacket).removeprefix("aten.")
            if name not in FREE:
                others.append(name)
            return function(*args, **(kwargs or {}))

    return Recorder()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched; none runs."""
    names = []
    monkeypatch.undo()  # conftest.py fills what is allocated

    def launch_nothing(self, *_, **__):
        names.append(self.jitted.fn.__name__)

    monkeypatch.setattr(dispatch.Kernel, "launch", launch_nothing)
    monkeypatch.setattr("fused_ce.cross_entropy.is_traced", lambda logits: False)
    monkeypatch.setattr("fused_ce.cross_entropy.choose", lambda device: "triton")
    return names


@pytest.mark.parametrize("n_rows, vocab_size, kernel", [
    pytest.param(5, 65, "small", id="small"),
    pytest.param(200, 1100, "forward_with_grad", id="stream"),
    pytest.param(2, 50257, "split", id="split"),
])  # fmt: skip
@pytest.mark.parametrize("options", [
    dict(), dict(reduction="sum"), dict(reduction="none"), dict(normalizer=7.0),
    dict(normalizer="tensor"), dict(weight="classes", sample_weight="rows"),
], ids=str)  # fmt: skip
def test_a_loss_is_two_launches_at_most_and_nothing_else(
    kernel_device, launched, n_rows, vocab_size, kernel, options
):
    """PyTorch allocates: every fill, copy or sum of its own would be one more launch."""
    tensors = dict(
        tensor=torch.tensor(7.0, device=kernel_device), rows=torch.ones(n_rows).to(kernel_device),
        classes=torch.ones(vocab_size, device=kernel_device),
    )  # fmt: skip
    options = {name: tensors.get(value, value) for name, value in options.items()}
    is_scalar = options.get("reduction") != "none"
    logits = torch.empty(n_rows, vocab_size, device=kernel_device, requires_grad=True)
    targets = torch.zeros(n_rows, dtype=torch.long, device=kernel_device)
    upstream = torch.ones(() if is_scalar else (n_rows,), device=kernel_device)
    others = []
    with operations(others):
        loss = fused_cross_entropy(logits, targets, **options)
        forward = launched[:]
        torch.autograd.grad(loss, logits, upstream)
    assert others == []
    first = ["prepare_kernel"] if is_scalar or kernel == "split" else []
    made = kernel if is_scalar or kernel != "forward_with_grad" else "forward"
    of_split = ["cross_entropy_backward_kernel"] if is_scalar and kernel == "split" else []
    assert forward == [*first, f"cross_entropy_{made}_kernel", *of_split]
    assert len(launched) == len(forward) + 1


@pytest.mark.parametrize("vocab_size", [65, 1100])
@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("weighted, smoothing", [(False, 0.0), (True, 0.0), (True, 0.1)])
def test_an_operator_is_one_launch_and_nothing_else(
    kernel_device, launched, vocab_size, return_stats, weighted, smoothing
):
    """What nobody keeps is not filled for the sake of the compiler, which knows its size."""
    logits = torch.empty(1, 5, vocab_size, device=kernel_device)
    targets = torch.zeros(1, 5, dtype=torch.long, device=kernel_device)
    weight = torch.ones(vocab_size, device=kernel_device) if weighted else None
    options = (-100, smoothing, 0.0, 1.0, None, return_stats, "triton")
    others = []
    with operations(others):
        results = RowLosses.forward(logits, targets, weight, *options)
    assert others == (["clone"] if return_stats else [])  # the user may change the entropy
    assert launched == [f"cross_entropy_{'small' if vocab_size == 65 else 'forward'}_kernel"]
    stats, shares = 5 if return_stats else 0, 5 if weighted and smoothing else 0
    assert [len(result) for result in results] == [5, stats, stats, stats, 5, 5, shares]
