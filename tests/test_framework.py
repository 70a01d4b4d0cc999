"""The rest of PyTorch: mixed precision, CUDA graphs, several GPUs."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from oracle import SEED, random_logits, random_targets

from fused_ce import fused_cross_entropy

V = 65


def trained(function, device, dtype, scaled, steps=15):
    """(losses, weights) of a small model trained in mixed precision."""
    torch.manual_seed(SEED)
    kind = torch.device(device).type
    model = torch.nn.Sequential(
        torch.nn.Embedding(V, 32), torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, V)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**12, enabled=scaled)
    tokens = random_targets(2, 9, classes=V, device=device)
    losses = []
    for _ in range(steps):
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1])
            loss = function(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == (2.0**12 if scaled else 1.0)  # no step was skipped
    return torch.tensor(losses), model[3].weight.detach()


@pytest.mark.parametrize("dtype, scaled", [
    pytest.param(torch.bfloat16, False, id="bfloat16"),
    pytest.param(torch.float16, True, id="float16-with-grad-scaler"),
])  # fmt: skip
def test_mixed_precision_trains_as_with_torch(fused_device, dtype, scaled):
    """As near to torch's own run as that is to the one in float32."""
    ours, _ = trained(fused_cross_entropy, fused_device, dtype, scaled)
    torchs, _ = trained(F.cross_entropy, fused_device, dtype, scaled)
    right, _ = trained(F.cross_entropy, fused_device, torch.float32, False)
    assert ours[-1] < 0.7 * ours[0]
    distance = (torchs - right).abs().max()
    assert (ours - right).abs().max() <= 2 * distance + 0.01


def test_float16_gradients_survive_with_a_scale(fused_device):
    """3e-8 underflows in float16; 3e-8 times the scaler's factor does not."""
    n_rows = 64
    logits = random_logits(n_rows, V, device=fused_device).half().requires_grad_()
    targets = random_targets(n_rows, classes=V, device=fused_device)
    loss = fused_cross_entropy(logits, targets)
    (loss * 2.0**16).backward()
    right = logits.detach().double().requires_grad_()
    (F.cross_entropy(right, targets) * 2.0**16).backward()
    tiny = right.grad.abs() < 2.0**16 * 2.0**-25  # what the unscaled gradient would lose
    assert tiny.any()
    assert (logits.grad[tiny & (right.grad.abs() > 1e-3)] != 0).all()
    torch.testing.assert_close(logits.grad.double(), right.grad, rtol=1e-3, atol=1e-6)


def needs_cuda(devices=1):
    if torch.cuda.device_count() < devices:
        pytest.skip(f"fewer than {devices} CUDA devices")


@pytest.mark.cuda
@pytest.mark.parametrize("vocab_size, n_rows", [(V, 64), (5000, 64), (50257, 2)])
@pytest.mark.parametrize("options", [
    pytest.param({}, id="in-forward"),
    pytest.param(dict(grad_in_forward=False, label_smoothing=0.1), id="in-backward"),
    pytest.param(dict(reduction="none", z_loss=0.1), id="none"),
])  # fmt: skip
def test_cuda_graph_of_forward_and_backward(vocab_size, n_rows, options):
    """Captured once, replayed on other numbers: what it launched then reads them."""
    needs_cuda()
    logits = torch.zeros(n_rows, vocab_size, device="cuda", requires_grad=True)
    targets = torch.zeros(n_rows, dtype=torch.long, device="cuda")

    def step():
        loss = fused_cross_entropy(logits, targets, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        return loss, gradient

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile and allocate before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for seed in range(3):
        with torch.no_grad():
            logits.copy_(random_logits(n_rows, vocab_size, device="cuda", seed=seed))
            targets.copy_(random_targets(n_rows, classes=vocab_size, device="cuda", seed=seed))
            targets[0] = -100
        graph.replay()
        torch.testing.assert_close((loss, gradient), step())


@pytest.mark.cuda
def test_tensors_of_another_gpu_than_the_current_one():
    needs_cuda(2)
    logits = random_logits(8, 2000, device="cuda:1").requires_grad_()
    targets = random_targets(8, classes=2000, device="cuda:1")
    with torch.cuda.device(0):
        fused_cross_entropy(logits, targets).backward()
    right = torch.func.grad(F.cross_entropy)(logits.detach(), targets)
    torch.testing.assert_close(logits.grad, right)


def test_kernels_are_launched_on_the_device_of_the_logits(monkeypatch):
    """Triton launches on the current device: without a GPU, that it is changed for every launch."""
    launch = pytest.importorskip("fused_ce.kernels.launch")
    dispatch = pytest.importorskip("fused_ce.kernels.dispatch")
    inside, launched = [], []

    @contextlib.contextmanager
    def on_device(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    original = dispatch.Kernel.launch

    def recorded(self, *args, **kwargs):
        launched.append(bool(inside))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(launch, "_on_device", on_device)
    monkeypatch.setattr(dispatch.Kernel, "launch", recorded)
    monkeypatch.setattr("fused_ce.cross_entropy.choose", lambda device: "triton")
    for vocab_size in (V, 1100, 9000):
        logits = random_logits(2, vocab_size).requires_grad_()
        targets = random_targets(2, classes=vocab_size)
        for route in (True, False):
            loss = fused_cross_entropy(logits, targets, grad_in_forward=route)
            (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
            torch.autograd.grad(gradient.sum(), logits)
    assert launched and all(launched)
