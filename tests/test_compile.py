"""torch.library, torch.compile, torch.export: one graph, one compilation, the same numbers.

Most graphs run on the backend aot_eager, which has no code to generate: what Dynamo and AOTAutograd
make of the loss is the same.
"""

import contextlib
import io
from functools import partial

import pytest
import torch
from oracle import SEED, random_logits, random_targets, random_weight
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fused_ce
from fused_ce import FusedCrossEntropyLoss, backend, fused_cross_entropy
from fused_ce.backend import choose
from fused_ce.options import RowOptions

V = 50
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param(dict(reduction="sum", inplace=True), id="inplace"),
    pytest.param(
        dict(grad_in_forward=True, label_smoothing=0.1), id="in-forward", marks=pytest.mark.slow
    ),
    pytest.param(dict(z_loss=0.1, softcap=3.0, logit_scale=0.5), id="softcap"),
    pytest.param(dict(return_stats=True, reduction="none"), id="stats"),
    pytest.param(dict(normalizer=torch.tensor(5.0)), id="normalizer", marks=pytest.mark.slow),
]


class Model(torch.nn.Module):
    """A language model of one layer, its loss in its forward."""

    def __init__(self, checkpointed=False, **options):  # noqa: D107
        super().__init__()
        self.embedding = torch.nn.Embedding(V, 16)
        self.head = torch.nn.Linear(16, V)
        self.loss = FusedCrossEntropyLoss(dim=-1, **options)
        self.checkpointed = checkpointed

    def forward(self, tokens):
        x = self.embedding(tokens)
        if self.checkpointed:
            return checkpoint(self.head_and_loss, x, tokens, use_reentrant=False)
        return self.head_and_loss(x, tokens)

    def head_and_loss(self, x, tokens):
        return self.loss(self.head(x)[:, :-1], tokens[:, 1:])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Nothing of earlier compilations, on disk neither: what they have is not checked again."""
    from torch._inductor import config

    torch._dynamo.reset()
    counters.clear()
    with config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def compilations():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def model(fused_device):
    """Makes a model on the device."""

    def make(**options):
        torch.manual_seed(SEED)
        if isinstance(options.get("normalizer"), torch.Tensor):
            options["normalizer"] = options["normalizer"].to(fused_device)
        return Model(**options).to(fused_device)

    return make


def tokens_of(shape, device):
    tokens = random_targets(*shape, classes=V, device=device)
    tokens[0, 2] = 0
    return tokens


def results(function, model, tokens):
    """Everything that a step returns, and the gradients of the model."""
    model.zero_grad()
    returned = function(tokens)
    loss, stats = returned if isinstance(returned, tuple) else (returned, ())
    (loss.sum() + sum(s.sum() for s in stats[:3])).backward()
    return [loss, *stats], [parameter.grad.clone() for parameter in model.parameters()]


class TestCompile:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_one_graph_for_every_number_of_rows(self, model, fused_device, options):
        """dynamic=True: no graph break, and one compilation, forward and backward."""
        plain = model(**options)
        compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
        for shape in ((2, 5), (3, 9), (7, 4)):
            tokens = tokens_of(shape, fused_device)
            torch.testing.assert_close(
                results(compiled, plain, tokens), results(plain, plain, tokens)
            )
        assert compilations() == 1

    def test_by_default_the_second_shape_compiles_and_no_other(self, model, fused_device):
        plain = model()
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        for shape in ((2, 5), (3, 9), (7, 4), (5, 12), (6, 6)):
            tokens = tokens_of(shape, fused_device)
            torch.testing.assert_close(
                results(compiled, plain, tokens), results(plain, plain, tokens)
            )
        assert compilations() == 2

    def test_a_number_as_normalizer_does_not_compile_again_and_again(self, fused_device):
        logits = random_logits(6, V, device=fused_device)
        targets = random_targets(6, classes=V, device=fused_device)
        compiled = torch.compile(
            lambda n: fused_cross_entropy(logits, targets, normalizer=n),
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        for number in (3.0, 4.5, 6.25, 7.0, 11.5):
            right = fused_cross_entropy(logits, targets, normalizer=number)
            torch.testing.assert_close(compiled(number), right)
        assert compilations() <= 2

    @pytest.mark.slow
    def test_generated_code(self, model, fused_device):
        """By Inductor, in mixed precision."""
        plain = model(label_smoothing=0.1)
        compiled = torch.compile(plain, fullgraph=True, dynamic=True)
        kind = torch.device(fused_device).type
        for shape in ((2, 5), (3, 9)):
            tokens = tokens_of(shape, fused_device)
            with torch.autocast(kind, torch.bfloat16):
                got, right = results(compiled, plain, tokens), results(plain, plain, tokens)
            torch.testing.assert_close(got, right, rtol=1e-2, atol=1e-3)

    def test_ignore_index_as_an_argument_of_the_graph(self, fused_device):
        logits = random_logits(6, V, device=fused_device)
        targets = random_targets(6, classes=V, device=fused_device)

        def step(index):
            return fused_cross_entropy(logits, targets, ignore_index=index)

        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for index in (int(targets[0]), int(targets[1]), -7):
            torch.testing.assert_close(compiled(index), step(index))

    def test_ignore_index_as_a_tensor(self, fused_device):
        """Its value is that of each call."""
        logits = random_logits(6, V, device=fused_device).requires_grad_()
        targets = random_targets(6, classes=V, device=fused_device)

        def loss_of(index):
            return fused_cross_entropy(logits, targets, ignore_index=index)

        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        for index in (*targets[:2].cpu(), torch.tensor(-7)):
            loss, right = compiled(index), loss_of(int(index))
            torch.testing.assert_close(loss, right)
            (gradient,), (right_gradient,) = (
                torch.autograd.grad(value, logits) for value in (loss, right)
            )
            torch.testing.assert_close(gradient, right_gradient)
        assert compilations() == 1

    @pytest.mark.parametrize("probabilities", [False, True])
    def test_weights_and_probabilities(self, fused_device, probabilities):
        logits = random_logits(6, V, device=fused_device).requires_grad_()
        targets = random_targets(6, classes=V, device=fused_device)
        if probabilities:
            targets = random_logits(6, V, device=fused_device, seed=9).softmax(-1).requires_grad_()
        sample_weight = torch.rand(6).to(fused_device).requires_grad_()
        weight = random_weight(V, device=fused_device)
        leaves = [logits, sample_weight, *([targets] if probabilities else [])]

        def step(*tensors):
            return fused_cross_entropy(*tensors[:3], sample_weight=tensors[3])

        found = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            loss = function(logits, targets, weight, sample_weight)
            found.append([loss, *torch.autograd.grad(loss, leaves)])
        torch.testing.assert_close(*found)

    @pytest.mark.slow
    @pytest.mark.parametrize("layout", ["sliced", "misaligned", "channels-first", "expanded"])
    @pytest.mark.parametrize("vocab_size", [V, 1100])
    def test_layouts(self, fused_device, layout, vocab_size):
        """Inductor trusts the strides that the fake gradient has."""
        dim = 1 if layout == "channels-first" else -1
        shape = (2, vocab_size, 3) if dim == 1 else (2, 3, vocab_size)
        logits = random_logits(*shape, device=fused_device)
        if layout == "sliced":
            logits = random_logits(2, 4, vocab_size + 3, device=fused_device)[:, 1:, :-3]
        elif layout == "misaligned":
            storage = random_logits(6 * vocab_size + 1, device=fused_device)
            logits = storage[1:].view(shape)
        elif layout == "expanded":
            logits = logits[:1].expand(shape)
        targets = random_targets(2, 3, classes=vocab_size, device=fused_device)
        leaf = logits.detach().requires_grad_()

        def step(x):
            return fused_cross_entropy(x, targets, dim=dim, reduction="sum")

        (right,) = torch.autograd.grad(step(leaf), leaf)
        (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(leaf), leaf)
        torch.testing.assert_close(got, right)

    def test_operators_return_aligned_gradients(self, fused_device):
        """As versions of Inductor trust that they do, whatever the alignment of the logits."""
        storage = random_logits(3 * V + 1, device=fused_device)
        given = list(operands(fused_device, vocab_size=V, requires_grad=False)["row_gradients"])
        given[3] = torch.cat([storage, storage])[1 : 6 * V + 1].view(2, 3, V)
        assert given[3].data_ptr() % 16
        gradient, _ = torch.ops.fused_ce.row_gradients(*given)
        assert gradient.data_ptr() % 16 == 0
        assert gradient.stride() == given[3].stride()

    def test_checkpoint_inside(self, model, fused_device):
        plain = model(checkpointed=True)
        compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
        tokens = tokens_of((3, 7), fused_device)
        torch.testing.assert_close(results(compiled, plain, tokens), results(plain, plain, tokens))

    def test_no_gradient_needed(self, model, fused_device):
        plain = model()
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        tokens = tokens_of((3, 7), fused_device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens), plain(tokens))

    @pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.vmap])
    def test_transforms_inside(self, fused_device, transform):
        logits = random_logits(3, 4, V, device=fused_device)
        targets = random_targets(4, classes=V, device=fused_device)
        function = transform(lambda x: fused_cross_entropy(x, targets))
        given = logits if transform is torch.vmap else logits[0, :, :5]
        targets %= 5
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(given), function(given))

    def test_errors_of_arguments_are_raised(self):
        compiled = torch.compile(fused_cross_entropy, backend="aot_eager")
        with pytest.raises(Exception, match="need targets"):
            compiled(torch.zeros(4, 5), torch.zeros(3, dtype=torch.long))

    def test_a_target_out_of_range_raises_on_the_host(self):
        compiled = torch.compile(fused_cross_entropy, fullgraph=True, backend="aot_eager")
        targets = torch.tensor([0, 1, 7])
        with pytest.raises(IndexError, match="target 7 of row 2 is out of range"):
            compiled(torch.zeros(3, 5), targets)

    def test_a_graph_keeps_its_backend(self):
        names = []
        logits, targets = random_logits(3, 5), random_targets(3, classes=5)
        compiled = torch.compile(
            fused_cross_entropy, fullgraph=True,
            backend=lambda graph, _: names.append(graph.print_readable(False)) or graph,
        )  # fmt: skip
        for name in ("cpu", "reference"):
            with backend(name):
                torch._dynamo.reset()
                compiled(logits, targets)
        operator = "torch.ops.fused_ce.row_losses"
        assert operator in names[0] and "'cpu'" in names[0]
        assert operator not in names[1] and "log_softmax" in names[1]

    @pytest.mark.cuda
    def test_cuda_graphs(self):
        """mode="reduce-overhead" captures the loss with its model, forward and backward."""
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        plain = Model().cuda()
        compiled = torch.compile(plain, mode="reduce-overhead", fullgraph=True)
        for seed in range(5):
            tokens = random_targets(3, 9, classes=V, device="cuda", seed=seed)
            torch.compiler.cudagraph_mark_step_begin()
            got, right = results(compiled, plain, tokens), results(plain, plain, tokens)
            torch.testing.assert_close(got, right)


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_model_with_loss(self, strict):
        model = Model()
        batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=3)
        exported = torch.export.export(
            model, (tokens_of((2, 6), "cpu"),), dynamic_shapes=({0: batch, 1: length},),
            strict=strict,
        )  # fmt: skip
        buffer = io.BytesIO()
        torch.export.save(exported, buffer)
        loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
        assert "fused_ce.row_losses" in exported.graph_module.code
        tokens = tokens_of((5, 9), "cpu")
        got = results(loaded, loaded, tokens)
        torch.testing.assert_close(got, results(model, model, tokens))

    def test_make_fx_sees_operators(self):
        logits, targets = random_logits(3, 5).requires_grad_(), random_targets(3, classes=5)

        def step(logits):
            return torch.autograd.grad(fused_cross_entropy(logits, targets), logits)[0]

        graph = make_fx(step)(logits)
        names = [str(node.target) for node in graph.graph.nodes]
        assert "fused_ce.row_losses.default" in names
        assert "fused_ce.row_gradients.default" in names
        torch.testing.assert_close(graph(logits), step(logits))


def operands(device, dtype=torch.float32, vocab_size=7, probabilities=False, requires_grad=True):
    """Arguments of the three operators, by name."""
    where = choose(torch.device(device))
    options = RowOptions(-100, 0.1, 0.01, 1.1, 3.0, True, where)
    logits = random_logits(2, 3, vocab_size, dtype=dtype, device=device)
    direction = random_logits(2, 3, vocab_size, dtype=dtype, device=device, seed=4)
    targets = random_targets(2, 3, classes=vocab_size, device=device)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = [torch.randn(6, dtype=compute).to(device) for _ in range(3)]
    if probabilities:
        targets = direction.softmax(-1)
    weight = random_weight(vocab_size, device=device)
    kept = torch.ops.fused_ce.row_losses(logits, targets, weight, *options)
    for tensor in (logits, *upstream, *([targets] if probabilities else [])):
        tensor.requires_grad_(requires_grad)
    rows, needs = (logits, targets, weight), (True, probabilities)
    soft = direction if probabilities else None
    return {
        "row_losses": (*rows, *options),
        "row_gradients": (*upstream, *rows, *kept[4:], kept[2], *needs, *options),
        "row_tangents": (direction, soft, *upstream, *rows, *needs, *options),
    }


class TestLibrary:
    @pytest.mark.parametrize("name", [
        "row_losses", "row_gradients", pytest.param("row_tangents", marks=pytest.mark.slow),
    ])  # fmt: skip
    @pytest.mark.parametrize("probabilities", [False, True])
    def test_opcheck(self, fused_device, name, probabilities):
        given = operands(fused_device, probabilities=probabilities)[name]
        torch.library.opcheck(getattr(torch.ops.fused_ce, name).default, given)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["row_losses", "row_gradients", "row_tangents"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("vocab_size", [1, 1100])
    def test_opcheck_of_shapes_and_dtypes(self, fused_device, name, dtype, vocab_size):
        given = operands(fused_device, dtype, vocab_size, requires_grad=False)[name]
        torch.library.opcheck(
            getattr(torch.ops.fused_ce, name).default, given,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip

    @pytest.mark.parametrize("dim", [0, 2])
    @pytest.mark.parametrize("name", ["row_losses", "row_gradients", "row_tangents"])
    def test_operators_map_over_a_batch(self, name, dim):
        """torch.vmap of the operators themselves."""
        operator = getattr(torch.ops.fused_ce, name)
        given = list(operands("cpu", probabilities=True, requires_grad=False)[name])
        at = {"row_losses": 0, "row_gradients": 3, "row_tangents": 5}[name]
        batch = torch.stack([given[at], given[at].cos()])

        def mapped(tensor):
            return operator(*given[:at], tensor, *given[at + 1 :])

        got = torch.vmap(mapped, in_dims=dim)(batch.movedim(0, dim))
        for i in range(2):
            torch.testing.assert_close([value[i] for value in got], list(mapped(batch[i])))

    def test_eager_calls_do_not_go_through_the_dispatcher(self, fused_device, monkeypatch):
        """They would pay for it: `python -m benchmarks.host_cost`."""
        for name in ("row_losses", "row_gradients"):
            monkeypatch.setattr(fused_ce.row_losses, name, None)
        logits = random_logits(3, V, device=fused_device).requires_grad_()
        fused_cross_entropy(logits, random_targets(3, classes=V, device=fused_device)).backward()
        assert logits.grad.isfinite().all()

    def test_modes_see_the_operators(self, fused_device):
        from torch.utils._python_dispatch import TorchDispatchMode

        seen = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        logits = random_logits(3, V, device=fused_device).requires_grad_()
        targets = random_targets(3, classes=V, device=fused_device)
        with Recorder():
            fused_cross_entropy(logits, targets).backward()
        assert "fused_ce.row_losses.default" in seen
        assert "fused_ce.row_gradients.default" in seen

    @pytest.mark.parametrize("mode", ["inside", "outside"])
    def test_fake_tensors(self, mode):
        from torch._subclasses import FakeTensorMode

        fake = FakeTensorMode()
        logits = fake.from_tensor(random_logits(3, V)).requires_grad_()
        targets = fake.from_tensor(random_targets(3, classes=V))
        with fake if mode == "inside" else contextlib.nullcontext():
            loss, stats = fused_cross_entropy(logits, targets, return_stats=True)
            loss.backward()
        assert loss.shape == () and logits.grad.shape == logits.shape
        assert [s.shape for s in stats] == [(3,)] * 4

    def test_meta_tensors(self):
        logits = torch.empty(3, V, device="meta", dtype=torch.bfloat16, requires_grad=True)
        loss = fused_cross_entropy(logits, torch.empty(3, dtype=torch.long, device="meta"))
        loss.backward()
        assert loss.dtype == torch.float32
        assert (logits.grad.shape, logits.grad.dtype) == (logits.shape, logits.dtype)


def test_subclasses_without_dispatch_are_as_any_tensor(fused_device):
    class Named(torch.Tensor):
        pass

    plain = random_logits(3, V, device=fused_device)
    targets = random_targets(3, classes=V, device=fused_device)
    logits = plain.as_subclass(Named).requires_grad_()
    loss = fused_cross_entropy(logits, targets)
    loss.backward()
    right = torch.func.grad(partial(fused_cross_entropy, targets=targets))(plain)
    torch.testing.assert_close(logits.grad, right)


def test_subclasses_with_dispatch_are_refused(fused_device):
    from torch.testing._internal.two_tensor import TwoTensor

    plain = random_logits(3, V, device=fused_device)
    targets = random_targets(3, classes=V, device=fused_device)
    both = TwoTensor(plain, plain)
    for logits, where in ((both, targets), (plain, TwoTensor(targets, targets))):
        with pytest.raises(TypeError, match="plain tensor, got a TwoTensor"):
            fused_cross_entropy(logits, where)
    with backend("reference"):
        loss = fused_cross_entropy(both, targets)
    torch.testing.assert_close(loss.a, fused_cross_entropy(plain, targets))
