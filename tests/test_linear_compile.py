"""The linear loss under compilers and modes: operators, no logits, one graph for any N."""

import contextlib
import io

import pytest
import torch
from oracle import SEED, random_logits, random_targets, random_weight
from test_compile import compilations, fresh_dynamo  # noqa: F401
from test_cpu import peak_memory
from test_linear import OPTIONS, a_head, all_of, assert_same, some_targets
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ce import (
    FusedLinearCrossEntropyLoss,
    fused_linear_cross_entropy,
    reference_linear_cross_entropy,
)
from fused_ce.backend import choose
from fused_ce.linear_chunks import Plan
from fused_ce.options import LossOptions

V, H = 50, 16


class Model(torch.nn.Module):
    """A language model of one layer, its loss in its forward."""

    def __init__(self, tied=True, **options):  # noqa: D107
        super().__init__()
        self.embedding = torch.nn.Embedding(V, H)
        self.weight = self.embedding.weight if tied else torch.nn.Parameter(torch.randn(V, H))
        self.loss = FusedLinearCrossEntropyLoss(chunk_size=8, **options)

    def forward(self, tokens):
        x = self.embedding(tokens).cos()
        return self.loss(x[:, :-1], self.weight, tokens[:, 1:])


def tokens_of(shape, device):
    tokens = random_targets(*shape, classes=V, device=device)
    tokens[0, 2] = 0
    return tokens


def results(function, model, tokens):
    """Everything that a step returns, and the gradients of the model."""
    model.zero_grad()
    returned = function(tokens)
    loss, stats = returned if isinstance(returned, tuple) else (returned, ())
    (loss.sum() * 0.7 + sum(s.sum() for s in stats[:3])).backward()
    return [loss, *stats], [parameter.grad.clone() for parameter in model.parameters()]


def modelled(device, **options):
    torch.manual_seed(SEED)
    return Model(**options).to(device)


SLOW = pytest.mark.slow
COMPILED = [
    pytest.param({}, id="plain"),
    pytest.param(dict(tied=False, ignore_index=3), id="untied", marks=SLOW),
    pytest.param(
        dict(reduction="sum", grad_in_forward=False, label_smoothing=0.1), id="in-back", marks=SLOW
    ),
    pytest.param(dict(z_loss=0.1, softcap=3.0, logit_scale=0.5), id="softcap"),
    pytest.param(dict(return_stats=True, reduction="none"), id="stats-of-rows", marks=SLOW),
    pytest.param(dict(return_stats=True), id="stats"),
    pytest.param(
        dict(normalizer=5.0, skip_ignored=True, ignore_index=3), id="normalizer", marks=SLOW
    ),
]


class TestCompile:
    @pytest.mark.parametrize("options", COMPILED)
    def test_one_graph_for_every_number_of_rows(self, fused_device, options):
        """dynamic=True: no graph break, and one compilation, forward and backward."""
        plain = modelled(fused_device, **options)
        compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
        for shape in ((2, 5), (3, 9), (7, 4)):
            tokens = tokens_of(shape, fused_device)
            torch.testing.assert_close(
                results(compiled, plain, tokens), results(plain, plain, tokens)
            )
        assert compilations() == 1

    def test_by_default_the_second_shape_compiles_and_no_other(self, fused_device):
        plain = modelled(fused_device)
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        for shape in ((2, 5), (3, 9), (7, 4), (5, 12), (6, 6)):
            tokens = tokens_of(shape, fused_device)
            torch.testing.assert_close(
                results(compiled, plain, tokens), results(plain, plain, tokens)
            )
        assert compilations() == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
    def test_generated_code(self, fused_device, logits_dtype):
        """By Inductor, in mixed precision."""
        plain = modelled(fused_device, logits_dtype=logits_dtype, ignore_index=3)
        compiled = torch.compile(plain, fullgraph=True, dynamic=True)
        kind = torch.device(fused_device).type
        for shape in ((2, 5), (3, 9)):
            tokens = tokens_of(shape, fused_device)
            with torch.autocast(kind, torch.bfloat16):
                got, right = results(compiled, plain, tokens), results(plain, plain, tokens)
            torch.testing.assert_close(got, right, rtol=1e-2, atol=1e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_options(self, fused_device, options, reduction):
        head, targets = a_head(device=fused_device), some_targets(device=fused_device)
        call = dict(options, reduction=reduction, return_stats=True, chunk_size=4)
        compiled = torch.compile(fused_linear_cross_entropy, backend="aot_eager", fullgraph=True)
        ours = all_of(compiled, head, targets, **call)
        theirs = all_of(reference_linear_cross_entropy, head, targets, **call)
        for mine, others in zip(ours, theirs, strict=True):
            assert_same(mine, others)

    @pytest.mark.parametrize("normalizer", ["number", "tensor"])
    def test_normalizers_do_not_compile_again(self, fused_device, normalizer):
        head = [t.requires_grad_() for t in a_head(device=fused_device)]
        targets = some_targets(device=fused_device)

        def step(n):
            return fused_linear_cross_entropy(*head[:2], targets, normalizer=n)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for number in (3.0, 4.5, 6.25, 7.0):
            n = torch.tensor(number).to(fused_device) if normalizer == "tensor" else number
            got, right = compiled(n), step(n)
            torch.testing.assert_close(got, right)
            assert_same(torch.autograd.grad(got, head[:2]), torch.autograd.grad(right, head[:2]))
        assert compilations() <= 2

    def test_the_loss_of_the_ignored_is_zero(self, fused_device):
        head, targets = a_head(device=fused_device), some_targets(device=fused_device)
        head[0][targets == -100] = torch.nan
        compiled = torch.compile(fused_linear_cross_entropy, backend="aot_eager", fullgraph=True)
        (losses,), grads = all_of(compiled, head, targets, reduction="none", skip_ignored=False)
        assert (losses[targets == -100] == 0).all() and (losses[targets != -100] > 0).all()
        assert all(grad.isfinite().all() for grad in grads)

    def test_an_infinite_upstream_leaves_the_ignored_at_zero(self, fused_device):
        head = [t.requires_grad_() for t in a_head(device=fused_device)]
        targets = some_targets(device=fused_device)
        compiled = torch.compile(fused_linear_cross_entropy, backend="aot_eager", fullgraph=True)
        loss = compiled(*head[:2], targets)
        (grad,) = torch.autograd.grad(loss, head[0], torch.full_like(loss, torch.inf))
        assert (grad[targets == -100] == 0).all() and not grad[targets != -100].isfinite().any()

    def test_no_gradient_needed(self, fused_device):
        plain = modelled(fused_device)
        seen = []
        compiled = torch.compile(
            plain, fullgraph=True,
            backend=lambda graph, _: seen.append(graph.print_readable(False)) or graph,
        )  # fmt: skip
        tokens = tokens_of((3, 7), fused_device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens), plain(tokens))
        operator = "torch.ops.fused_ce.linear_losses"
        assert operator in seen[0] and "False, False, False, False" in seen[0]

    @pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
    def test_transforms_inside(self, fused_device, transform):
        head, targets = a_head(4, 5, 3, device=fused_device), some_targets(4, 5, fused_device)
        function = transform(lambda x: fused_linear_cross_entropy(x, head[1], targets))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(head[0]), function(head[0]))

    def test_errors_of_arguments_are_raised(self):
        compiled = torch.compile(fused_linear_cross_entropy, backend="aot_eager")
        with pytest.raises(Exception, match="needs targets"):
            compiled(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(3, dtype=torch.long))

    def test_a_target_out_of_range_raises_on_the_host(self):
        compiled = torch.compile(fused_linear_cross_entropy, fullgraph=True, backend="aot_eager")
        with pytest.raises(IndexError, match="target 7 of row 2 is out of range"):
            compiled(torch.zeros(3, 2), torch.zeros(5, 2), torch.tensor([0, 1, 7]), chunk_size=1)

    @pytest.mark.parametrize("call", [{}, dict(grad_in_forward=False), dict(reduction="none")],
                             ids=str)  # fmt: skip
    def test_memory_is_that_of_a_chunk(self, call):
        """Forward and backward; and under a mode that watches every operator."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        leaves = [t.requires_grad_() for t in a_head(4096, 4000, 16, dtype=torch.float32)[:2]]
        targets = random_targets(4096, classes=4000)
        compiled = torch.compile(fused_linear_cross_entropy, backend="aot_eager", fullgraph=True)

        def step(function):
            function(*leaves, targets, **call).sum().backward()

        try:
            step(compiled)  # compiles
            peak = peak_memory(lambda: step(compiled))
        finally:
            torch.set_num_threads(threads)
        assert peak <= 0.25 * 4096 * 4000 * 4


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_model_with_loss(self, strict):
        model = modelled("cpu", tied=False)
        batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=3)
        exported = torch.export.export(
            model, (tokens_of((2, 6), "cpu"),), dynamic_shapes=({0: batch, 1: length},),
            strict=strict,
        )  # fmt: skip
        buffer = io.BytesIO()
        torch.export.save(exported, buffer)
        loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
        assert "fused_ce.linear_losses" in exported.graph_module.code
        tokens = tokens_of((5, 9), "cpu")
        torch.testing.assert_close(results(loaded, loaded, tokens), results(model, model, tokens))

    def test_make_fx_sees_operators(self):
        head, targets = a_head(), some_targets()
        weight = head[1]

        def step(hidden):
            loss = fused_linear_cross_entropy(hidden, weight, targets, reduction="none")
            return torch.autograd.grad(loss.sum(), hidden)[0]

        hidden = head[0].requires_grad_()
        graph = make_fx(step)(hidden)
        names = [str(node.target) for node in graph.graph.nodes]
        assert "fused_ce.linear_losses.default" in names
        assert "fused_ce.linear_gradients.default" in names
        torch.testing.assert_close(graph(hidden), step(hidden))


def operands(device, dtype=torch.float32, vocab_size=7, probabilities=False, made=True,
             requires_grad=True, reduction="mean", return_stats=True):  # fmt: skip
    """Arguments of the two operators, by name."""
    where = choose(torch.device(device))
    options = LossOptions(
        -100, reduction, 0.1, z_loss=0.01, logit_scale=1.1, softcap=3.0, return_stats=return_stats
    )
    plan = Plan(options, where, dtype, False, 2).flat()
    head = a_head(5, vocab_size, 3, dtype=dtype, device=device)
    targets = random_targets(1, 5, classes=vocab_size, device=device)
    if probabilities:
        targets = random_logits(1, 5, vocab_size, dtype=dtype, device=device, seed=3).softmax(-1)
    tensors = (*head, targets, random_weight(vocab_size, device=device),
               random_weight(5, device=device, seed=2), None)  # fmt: skip
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = [torch.randn(5, dtype=compute).to(device) for _ in range(3)]
    needs = (made,) * 3
    results = torch.ops.fused_ce.linear_losses(*tensors, *(False,) * 3, True, *plan)
    if requires_grad:
        for tensor in (*head, tensors[5], *([targets] if probabilities else [])):
            tensor.requires_grad_()
    return {
        "linear_losses": (*tensors, *needs, True, *plan),
        "linear_gradients": (
            *upstream, *(t if t is None else t.detach() for t in tensors),
            results[4], *results[7:10], True, True, True, probabilities, *plan,
        ),
    }  # fmt: skip


class TestLibrary:
    @pytest.mark.thinned
    @pytest.mark.parametrize("name", ["linear_losses", "linear_gradients"])
    @pytest.mark.parametrize("probabilities, made", [(False, True), (False, False), (True, False)])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_opcheck(self, fused_device, name, probabilities, made, reduction):
        made = made and reduction == "mean"
        given = operands(fused_device, probabilities=probabilities, made=made, reduction=reduction)[
            name
        ]
        torch.library.opcheck(getattr(torch.ops.fused_ce, name).default, given)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["linear_losses", "linear_gradients"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("vocab_size", [1, 1100])
    def test_opcheck_of_shapes_and_dtypes(self, fused_device, name, dtype, vocab_size):
        given = operands(fused_device, dtype, vocab_size, requires_grad=False)[name]
        torch.library.opcheck(
            getattr(torch.ops.fused_ce, name).default, given,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip

    @pytest.mark.parametrize("vocab_size", [7, 8192])  # 8,192: programs share rows so few
    @pytest.mark.parametrize("made", [False, True])
    def test_nothing_comes_that_was_not_asked_for(self, fused_device, vocab_size, made):
        """Only shapes that a compiler was told, whatever the kernels find besides."""
        given = operands(
            fused_device, vocab_size=vocab_size, made=made, requires_grad=False, return_stats=False
        )  # fmt: skip
        torch.library.opcheck(
            torch.ops.fused_ce.linear_losses.default, given["linear_losses"],
            test_utils="test_faketensor",
        )  # fmt: skip

    def test_eager_calls_do_not_go_through_the_dispatcher(self, fused_device, monkeypatch):
        for name in ("linear_losses", "linear_gradients"):
            monkeypatch.setattr(torch.ops.fused_ce, name, None)
        head = [t.requires_grad_() for t in a_head(device=fused_device)]
        targets = some_targets(device=fused_device)
        for reduction in ("mean", "none"):
            loss = fused_linear_cross_entropy(*head[:2], targets, reduction=reduction)
            loss.sum().backward()
        assert head[0].grad.isfinite().all()

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("differentiate_twice", [False, True])
    def test_under_a_mode(self, fused_device, reduction, differentiate_twice):
        """Operators, no logits (but for a second derivative), and the same numbers."""
        seen, shapes = [], set()

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                result = function(*args, **(kwargs or {}))
                for tensor in result if isinstance(result, tuple | list) else (result,):
                    if isinstance(tensor, torch.Tensor) and tensor.stride() != (0,) * tensor.dim():
                        shapes.add(tuple(tensor.shape))
                return result

        head = [t.requires_grad_() for t in a_head(device=fused_device)]
        targets = some_targets(device=fused_device)

        def step():
            loss = fused_linear_cross_entropy(
                *head[:2], targets, linear_bias=head[2], reduction=reduction, chunk_size=4
            ).cos().sum()  # fmt: skip
            grads = torch.autograd.grad(loss, head, create_graph=differentiate_twice)
            if not differentiate_twice:
                return [loss, *grads]
            return [loss, *grads, *torch.autograd.grad(sum(g.sum() for g in grads), head)]

        with Recorder():
            got = step()
        assert_same(got, step())
        assert "fused_ce.linear_losses.default" in seen
        if not differentiate_twice:
            assert ("fused_ce.linear_gradients.default" in seen) == (reduction == "none")
            assert not shapes & {(11, 33), (1, 11, 33)}

    def test_gradients_of_16_bits_are_multiplied_in_float32(self, fused_device):
        """A GPU rounds a factor without axes to the other's dtype: 65,536 would be inf."""
        factors = []

        class Products(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function is torch.ops.aten.mul.Tensor:
                    factors.append([t.dtype for t in args if isinstance(t, torch.Tensor)])
                return function(*args, **(kwargs or {}))

        head = [t.requires_grad_() for t in a_head(device=fused_device, dtype=torch.float16)]
        loss = fused_linear_cross_entropy(
            *head[:2], some_targets(device=fused_device), grad_in_forward=True
        )
        upstream = torch.full_like(loss, 65536.0)
        with Products():
            torch.autograd.grad(loss, head[:2], upstream)
        assert factors == [[torch.float32] * 2] * 2

    @pytest.mark.parametrize("mode", ["inside", "outside"])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_fake_tensors(self, mode, reduction):
        from torch._subclasses import FakeTensorMode

        fake = FakeTensorMode()
        head = [fake.from_tensor(t).requires_grad_() for t in a_head()]
        targets = fake.from_tensor(some_targets())
        with fake if mode == "inside" else contextlib.nullcontext():
            loss, stats = fused_linear_cross_entropy(
                *head[:2], targets, linear_bias=head[2], reduction=reduction, return_stats=True
            )
            loss.sum().backward()
        assert all(t.grad.shape == t.shape and t.grad.dtype == t.dtype for t in head)
        assert [s.shape for s in stats] == [(11,)] * 4

    def test_meta_tensors(self):
        hidden, weight = (
            torch.empty(n, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
            for n in (3, V)
        )
        targets = torch.empty(3, dtype=torch.long, device="meta")
        loss = fused_linear_cross_entropy(hidden, weight, targets)
        loss.backward()
        assert loss.dtype == torch.float32 and weight.grad.shape == weight.shape
