"""The launchers, with buffers whose surroundings are watched."""

import pytest
import torch
from oracle import (
    assert_all_as_exact_as_torch,
    derived,
    exact,
    inside,
    random_logits,
    random_targets,
    random_weight,
    untouched,
    worst,
)

pytest.importorskip("triton")
from fused_ce.kernels import launch, policy  # noqa: E402
from fused_ce.kernels.arguments import is_congruent  # noqa: E402
from fused_ce.options import LossOptions  # noqa: E402
from fused_ce.rows import Rows, Upstream, empty_gradient  # noqa: E402


def guarded(shape, dtype, device, offset=0, padding=2048):
    """An uninitialised (NaN) tensor, its storage filled with a sentinel around it."""
    values = torch.full(shape, torch.nan, dtype=dtype, device=device)
    return inside(values, 7.0, offset=offset, padding=padding)


SHAPES = [
    pytest.param((1, 3, 65), id="small"),
    pytest.param((2, 2, 65), id="small-groups"),
    pytest.param((1, 9, 64), id="small-more-rows-than-a-program"),
    pytest.param((1, 2, 1100), id="stream"),
    pytest.param((2, 2, 4203), id="stream-groups-bulk-and-tail"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gap, offset", [(0, 0), (5, 3)], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
class TestGuardBands:
    """Sentinels around every buffer that a launcher writes, NaN around what it reads."""

    def buffers(self, device, shape, dtype, gap, offset, inplace):
        values = random_logits(*shape, dtype=dtype, device=device)
        strides = ((shape[1] + 1) * (shape[2] + gap), shape[2] + gap, 1)
        logits, storage = inside(values, torch.nan, strides=strides, offset=offset)
        targets = random_targets(*shape[:2], classes=shape[2], device=device)
        targets[-1, 0] = -100
        if inplace:
            return values, logits, storage, targets, logits, storage, torch.nan
        # gradient rows lie at the same address modulo 16 bytes as their logits, and farther apart
        vector = 16 // dtype.itemsize
        far = tuple(s + 2 * vector for s in strides[:2])
        far = ((shape[1] + 1) * far[1] + (strides[0] - (shape[1] + 1) * strides[1]), far[1], 1)
        far = (far[0] + (strides[0] - far[0]) % vector, far[1], 1)
        out, out_storage = inside(
            torch.full(shape, torch.nan, dtype=dtype, device=device), 7.0, strides=far,
            offset=offset,
        )  # fmt: skip
        return values, logits, storage, targets, out, out_storage, 7.0

    def check(self, values, logits, storage, out, out_storage, fill, inplace):
        assert untouched(out_storage, out, fill)
        if not inplace:
            assert untouched(storage, logits, torch.nan)
            assert torch.equal(logits, values)

    def right(self, values, targets, weight, options, upstream):
        rows = values.reshape(-1, values.shape[2]).cpu()
        return exact(
            rows, targets.reshape(-1).cpu(), None if weight is None else weight.cpu(),
            upstream=upstream.cpu(), reduction=options.reduction,
            label_smoothing=options.label_smoothing,
        )  # fmt: skip

    def near(self, loss, gradient, right, dtype):
        right_loss, right_gradient = right
        if loss is not None:
            assert worst(loss, right_loss) <= 4e-7 * abs(right_loss).max()
        error = worst(gradient.reshape(right_gradient.shape), right_gradient)
        assert error <= 4 * torch.finfo(dtype).eps * abs(right_gradient).max()

    def test_forward_with_grad_and_scale(self, kernel_device, shape, dtype, gap, offset, inplace):
        values, logits, storage, targets, out, out_storage, fill = self.buffers(
            kernel_device, shape, dtype, gap, offset, inplace
        )
        weight = random_weight(shape[2], device=kernel_device)
        options = LossOptions(reduction="none", label_smoothing=0.1)
        losses = launch.forward_with_grad(Rows(logits, targets, weight), options, out).loss
        ones = torch.ones_like(losses)
        self.check(values, logits, storage, out, out_storage, fill, inplace)
        self.near(losses, out, self.right(values, targets, weight, options, ones), dtype)

        upstream = torch.linspace(-1.0, 2.0, losses.numel(), device=kernel_device)
        launch.scale(out, upstream, out)
        self.check(values, logits, storage, out, out_storage, fill, inplace)
        self.near(None, out, self.right(values, targets, weight, options, upstream), dtype)

    def test_backward(self, kernel_device, shape, dtype, gap, offset, inplace):
        values, logits, storage, targets, out, out_storage, fill = self.buffers(
            kernel_device, shape, dtype, gap, offset, inplace
        )
        options = LossOptions(reduction="mean", label_smoothing=0.1)
        weight = random_weight(shape[2], device=kernel_device)
        loss, *_, saved = launch.forward(Rows(logits, targets, weight), options)
        upstream = torch.tensor(0.7, device=kernel_device)
        launch.backward(Upstream(upstream), Rows(logits, targets, weight), saved, options, out)
        self.check(values, logits, storage, out, out_storage, fill, inplace)
        self.near(loss, out, self.right(values, targets, weight, options, upstream), dtype)


@pytest.mark.thinned
@pytest.mark.parametrize("held, unroll", [(1, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("vocab_size", [1100, 13000])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_held_and_streamed_tiles(
    kernel_device, monkeypatch, held, unroll, dtype, vocab_size, inplace
):
    """Rows that fit in the held tiles, and rows that do not, which the policy would not split so
    small: all of them held, some, or nearly none."""
    block_v = 128 * 16 // dtype.itemsize
    config = policy.StreamConfig(block_v, unroll, 4, held)
    monkeypatch.setattr(policy, "held_config", lambda *_: config)
    monkeypatch.setattr(launch, "row_splits", lambda *_: 1)
    values = random_logits(3, vocab_size, dtype=dtype, device=kernel_device)
    logits, _ = inside(values[None], torch.nan, strides=(0, vocab_size + 9, 1), offset=5)
    out = logits if inplace else empty_gradient(logits)
    targets = random_targets(1, 3, classes=vocab_size, device=kernel_device)
    targets[0, 1] = -100
    weight = random_weight(vocab_size, device=kernel_device)
    options = LossOptions(label_smoothing=0.1)
    loss = launch.forward_with_grad(Rows(logits, targets, weight), options, out).loss
    right_loss, right = exact(
        values.cpu(), targets[0].cpu(), weight.cpu(), upstream=torch.ones(()), label_smoothing=0.1
    )
    eps = torch.finfo(dtype).eps
    assert worst(loss, right_loss) <= max(8e-7, eps) * abs(right_loss)
    assert worst(out[0], right) <= 4 * eps * abs(right).max()


@pytest.mark.thinned
@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted, smoothing", [
    pytest.param(False, 0.0, id="plain"), pytest.param(True, 0.2, id="weight-and-smoothing"),
])  # fmt: skip
def test_split_rows(kernel_device, monkeypatch, splits, reduction, weighted, smoothing):
    """More programs a row than it has steps, too: some find nothing to do."""
    monkeypatch.setattr(launch, "row_splits", lambda *_: splits)
    values = random_logits(3, 5003, dtype=torch.bfloat16, device=kernel_device)
    values[0, :4000] = -torch.inf  # the first programs of this row find no finite logit
    values[2] = -torch.finfo(torch.bfloat16).max
    logits, targets = values[None], random_targets(1, 3, classes=5003, device=kernel_device)
    targets[0, 1] = -100
    targets[0, 0] = 4500
    weight = random_weight(5003, device=kernel_device) if weighted else None
    if smoothing:
        values[0, :4000] = -50.0
        values[2] = -300.0
    options = LossOptions(reduction=reduction, label_smoothing=smoothing)
    loss, *_, saved = launch.forward(Rows(logits, targets, weight), options)
    out, other = logits.clone(), logits.clone()
    again = launch.forward_with_grad(Rows(logits, targets, weight), options, out).loss
    assert torch.equal(loss, again)
    right_loss, right = exact(
        values.cpu(), targets[0].cpu(), None if weight is None else weight.cpu(),
        upstream=torch.ones_like(loss).cpu(), reduction=reduction, label_smoothing=smoothing,
    )  # fmt: skip
    assert worst(loss, right_loss) <= 2e-6 * abs(right_loss).max()
    upstream = torch.ones_like(loss)
    launch.backward(Upstream(upstream), Rows(logits, targets, weight), saved, options, other)
    for gradient in (out, other):  # of two binaries: with an upstream gradient, and without
        error = worst(gradient[0], right)
        assert error <= 4 * torch.finfo(torch.bfloat16).eps * abs(right).max()


EVERYTHING = dict(label_smoothing=0.1, z_loss=0.02, logit_scale=0.7, softcap=6.0, return_stats=True)


@pytest.mark.thinned
@pytest.mark.parametrize("held, unroll", [(1, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_held_and_streamed_tiles_with_every_option(kernel_device, monkeypatch, held, unroll, dtype,
                                                   kind):  # fmt: skip
    config = policy.StreamConfig(128 * 16 // dtype.itemsize, unroll, 4, held)
    monkeypatch.setattr(policy, "held_config", lambda *_: config)
    monkeypatch.setattr(launch, "row_splits", lambda *_: 1)
    logits = random_logits(3, 5003, dtype=dtype, device=kernel_device)
    targets = random_targets(3, classes=5003, device=kernel_device)
    if kind == "probabilities":
        targets = random_logits(3, 5003, device=kernel_device, seed=7).softmax(dim=1).to(dtype)
    else:
        targets[1] = -100
    assert_all_as_exact_as_torch(
        logits, targets, random_weight(5003, device=kernel_device),
        sample_weight=random_weight(3, device=kernel_device), needs=("logits", "sample_weight"),
        through=("loss",), grad_in_forward=True, **EVERYTHING,
    )  # fmt: skip


@pytest.mark.thinned
@pytest.mark.parametrize("splits", [2, 7])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("grad_in_forward", [True, False])
def test_split_rows_with_every_option(kernel_device, monkeypatch, splits, kind, grad_in_forward):
    monkeypatch.setattr(launch, "row_splits", lambda *_: splits)
    logits = random_logits(3, 5003, dtype=torch.bfloat16, device=kernel_device)
    logits[0, 3000] = 30.0  # the largest is in a later part, twice
    logits[0, 3007] = 30.0
    targets = random_targets(3, classes=5003, device=kernel_device)
    if kind == "probabilities":
        targets = random_logits(3, 5003, device=kernel_device, seed=7).softmax(dim=1)
    else:
        targets[1] = -100
    assert_all_as_exact_as_torch(
        logits, targets, random_weight(5003, device=kernel_device),
        sample_weight=random_weight(3, device=kernel_device), grad_in_forward=grad_in_forward,
        **EVERYTHING,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gap, offset", [(0, 0), (5, 3), (8, 0)], ids=str)
def test_probabilities_between_guard_bands(kernel_device, shape, dtype, gap, offset):
    """Rows of the probabilities begin where those of the logits do, or anywhere: nothing beside
    them is read (NaN) or written (a sentinel)."""
    logits = random_logits(*shape, dtype=dtype, device=kernel_device)
    strides = ((shape[1] + 1) * (shape[2] + gap), shape[2] + gap, 1)
    values = random_logits(*shape, device=kernel_device, seed=7).softmax(dim=2)
    targets, storage = inside(values, torch.nan, strides=strides, offset=offset)
    grad_targets, grad_storage = inside(
        torch.full_like(values, torch.nan), 7.0, strides=strides, offset=offset
    )
    options = LossOptions(reduction="sum")
    rows, grad_logits = Rows(logits, targets), torch.full_like(logits, torch.nan)
    *_, saved = launch.forward(rows, options)
    upstream = torch.tensor(0.7, device=kernel_device)
    launch.backward(Upstream(upstream), rows, saved, options, grad_logits, grad_targets)
    right, _ = derived(
        logits.reshape(-1, shape[2]).cpu(), values.reshape(-1, shape[2]).cpu(),
        upstreams=dict(loss=upstream.cpu()), reduction="sum",
    )  # fmt: skip
    for name, grad in dict(grad_logits=grad_logits, grad_targets=grad_targets).items():
        error = worst(grad.reshape(-1, shape[2]), right[name])
        assert error <= 4 * torch.finfo(grad.dtype).eps * abs(right[name]).max(), name
    assert untouched(grad_storage, grad_targets, 7.0)
    assert untouched(storage, targets, torch.nan) and torch.equal(targets, values)


@pytest.mark.parametrize("dtype, places, right", [
    pytest.param(torch.bfloat16, (0, 50257), True, id="contiguous-alike"),
    pytest.param(torch.float32, (0, 50257), True, id="another-dtype"),
    pytest.param(torch.float32, (8, 50257 + 16), True, id="padded-by-vectors"),
    pytest.param(torch.bfloat16, (1, 50257), False, id="another-start"),
    pytest.param(torch.bfloat16, (4, 50257), False, id="half-a-vector"),
    pytest.param(torch.bfloat16, (0, 50258), False, id="another-stride"),
])  # fmt: skip
def test_rows_that_begin_alike(dtype, places, right):
    """What gives probabilities 16-byte loads may not be true of rows that lie differently."""
    offset, stride = places
    logits = torch.empty(2 * 50257, dtype=torch.bfloat16).view(1, 2, 50257)
    storage = torch.empty(3 * 50257, dtype=dtype)
    others = storage.as_strided((1, 2, 50257), (0, stride, 1), offset)
    assert logits.data_ptr() % 16 == storage.data_ptr() % 16 == 0
    assert is_congruent(logits, others) == right
    assert is_congruent(logits, None, others) == right


@pytest.mark.parametrize("vocab_size", [65, 1100])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_out_of_range_targets_reach_nobody(kernel_device, vocab_size, inplace):
    """The columns beside a row are padding here: neither read (NaN) nor written (a sentinel)."""
    shape, strides = (1, 4, vocab_size), (0, vocab_size + 8, 1)
    targets = torch.tensor([[vocab_size, 0, -1, vocab_size + 3]], device=kernel_device)
    values = random_logits(*shape, device=kernel_device)
    options = LossOptions(reduction="sum", label_smoothing=0.1)
    one = torch.ones((), device=kernel_device)
    for route in (True, False):
        logits, storage = inside(values, 5.0, strides=strides)
        out, out_storage = logits, storage
        if not inplace:
            out, out_storage = inside(torch.full_like(values, torch.nan), 7.0, strides=strides)
        if route:
            launch.forward_with_grad(Rows(logits, targets, None), options, out)
        else:
            *_, saved = launch.forward(Rows(logits, targets, None), options)
            launch.backward(Upstream(one), Rows(logits, targets, None), saved, options, out)
        assert untouched(out_storage, out, 5.0 if inplace else 7.0)
        assert out[0, [0, 2, 3]].isnan().all() and out[0, 1].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 1100), (2, 2, 65)], ids=str)
@pytest.mark.parametrize("stride", [0, 1, 3], ids=["stride-0", "dense", "every-third"])
def test_scale_into_another_buffer(kernel_device, shape, stride):
    gradient = random_logits(*shape, device=kernel_device)
    before = gradient.clone()
    n_rows = shape[0] * shape[1]
    factors = torch.arange(1.0, 1 + 3 * n_rows, device=kernel_device)
    factors = factors.as_strided((n_rows,), (stride,))
    out, storage = guarded(shape, torch.float32, kernel_device)
    launch.scale(gradient, factors, out)
    torch.testing.assert_close(out, before * factors.view(*shape[:2], 1))
    assert torch.equal(gradient, before)
    assert untouched(storage, out, 7.0)


@pytest.mark.parametrize("n_elements", [1, 7, 32768, 32769, 100_003])
def test_scale_of_one_factor_walks_over_all_elements(kernel_device, n_elements):
    """A contiguous gradient is one long row, in pieces."""
    gradient = random_logits(1, 1, n_elements, dtype=torch.bfloat16, device=kernel_device)
    out, storage = guarded((1, 1, n_elements), torch.bfloat16, kernel_device)
    launch.scale(gradient, torch.tensor(0.5, device=kernel_device), out)
    assert torch.equal(out, gradient * 0.5)
    assert untouched(storage, out, 7.0)


def test_scale_of_more_rows_than_programs(kernel_device, monkeypatch):
    from fused_ce.kernels import backward

    monkeypatch.setattr(backward, "SCALE_PROGRAMS", 2)
    gradient = random_logits(5, 1, 70, device=kernel_device)[:, :, :67]
    out = empty_gradient(gradient)
    factors = torch.arange(1.0, 6.0, device=kernel_device)
    launch.scale(gradient, factors, out)
    torch.testing.assert_close(out, gradient * factors.view(5, 1, 1))


def test_one_launch_for_loss_and_gradient(kernel_device, monkeypatch):
    """The promise of the in-forward route: the logits are read once."""
    calls = []
    for name in ("launch_forward", "launch_forward_with_grad", "launch_backward", "launch_small"):
        function = getattr(launch, name)
        monkeypatch.setattr(
            launch, name, lambda *a, f=function, n=name, **k: (calls.append(n), f(*a, **k))
        )
    for vocab_size, kernel in ((1100, "launch_forward_with_grad"), (65, "launch_small")):
        logits = random_logits(1, 2, vocab_size, device=kernel_device)
        targets = random_targets(1, 2, classes=vocab_size, device=kernel_device)
        launch.forward_with_grad(
            Rows(logits, targets, None), LossOptions(), torch.empty_like(logits)
        )
        assert calls == [kernel]
        calls.clear()


def test_dense_logits_are_never_copied(kernel_device, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a copy"))
    logits = random_logits(2, 3, 1109, device=kernel_device)[:, :-1, :1100]
    targets = random_targets(2, 2, classes=1100, device=kernel_device)
    options, out = LossOptions(), torch.empty_like(logits)
    launch.forward_with_grad(Rows(logits, targets, None), options, logits)
    small = random_logits(1, 65, 3, device=kernel_device).transpose(1, 2)
    out = torch.empty_like(small)
    targets = random_targets(1, 3, classes=65, device=kernel_device)
    launch.forward_with_grad(Rows(small, targets, None), options, out)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_scale_of_classes_that_are_not_dense(kernel_device, factor):
    gradient = random_logits(1, 1100, 2, device=kernel_device).transpose(1, 2)
    before, out = gradient.clone(), torch.empty_like(gradient)
    launch.scale(gradient, torch.tensor(factor, device=kernel_device), out)
    assert torch.equal(out, before * factor)
    assert torch.equal(gradient, before)
    launch.scale(gradient, torch.tensor(factor, device=kernel_device), gradient)
    assert torch.equal(gradient, before * factor)
