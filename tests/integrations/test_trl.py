"""TRL: the fused heads of a patched trainer compute the same numbers by our operator, no others."""

import copy
import importlib.util
import math

import pytest
import torch
from ranks import on_ranks
from torch import nn

transformers = pytest.importorskip("transformers", reason='pip install "fused_ce[hf]"')
trl = pytest.importorskip("trl", reason='pip install "fused_ce[trl]"')

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from small_models import cohere, gemma2, granite, llama, mixtral, phi, tokens  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from trl.trainer import utils  # noqa: E402

from fused_ce.integrations import trl as integration  # noqa: E402
from fused_ce.integrations.trl import patch, patched, unpatch  # noqa: E402

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
IDS = tokens(3, 12)
LABELS = tokens(3, 12, ignored=0.4, seed=1)
BATCH = dict(input_ids=IDS, labels=LABELS)
MODELS = [llama, gemma2, cohere, granite, phi]


class Heads(transformers.Trainer):
    """What `patch` has to know of a trainer: its models, with the heads that TRL gives them."""

    def __init__(self, model, ref_model=None, outputs=FIELDS, **options):
        """With the fields of the heads, and further arguments of `add_fused_lm_head`."""
        self.model, self.ref_model = model, ref_model
        for each in (model, ref_model):
            if each is not None:
                utils.add_fused_lm_head(each, outputs=outputs, **options)


@pytest.fixture
def calls(monkeypatch):
    """(hidden states, keywords) of each call of our operator, in order."""
    seen, function = [], integration.fused_linear_cross_entropy

    def remember(hidden, *args, **kwargs):
        seen.append((hidden, kwargs))
        return function(hidden, *args, **kwargs)

    monkeypatch.setattr(integration, "fused_linear_cross_entropy", remember)
    return seen


def run(model, **batch):
    """(outputs, gradients) of a forward with a head, where each row weighs something else."""
    model.zero_grad()
    out = model(**{**BATCH, **batch}, fused_lm_head=True)
    factors = torch.linspace(0.5, 1.5, out.log_probs.numel()).view_as(out.log_probs)
    loss = out.loss + (factors * out.log_probs).sum()
    if out.entropy is not None:
        loss = loss + 0.3 * (factors * out.entropy).sum()
    loss.backward()
    return out, [weight.grad for weight in model.parameters() if weight.requires_grad]


def assert_same(ours, theirs, rtol=1e-5):
    """Fields, dtypes and shapes; to what is left of sums, relative to the largest element."""
    (ours, our_grads), (theirs, their_grads) = ours, theirs
    assert ours.keys() == theirs.keys()
    fields = [(ours[name], theirs[name]) for name in theirs.keys()]  # noqa: SIM118
    for a, b in [*fields, *zip(our_grads, their_grads, strict=True)]:
        assert a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        if a.dtype == torch.bool:
            assert torch.equal(a, b)
        elif a.numel() > 0:
            atol = max(1e-6, 0.5 * rtol * b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


HEADS = [
    pytest.param({}, id="plain"),
    pytest.param(dict(temperature=0.6), id="temperature"),
    pytest.param(dict(temperature=1.7, cast_lm_head_to_fp32=True), id="float32-head"),
]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("new_model", [*MODELS, mixtral])
def test_every_field_and_gradient_is_that_of_trl(calls, new_model, options):
    trainer = Heads(new_model(), **options)
    theirs = run(trainer.model)
    assert not calls and all(theirs[0][name] is not None for name in FIELDS)
    with patched(trainer):
        ours = run(trainer.model)
    assert calls
    assert_same(ours, theirs)
    n_calls = len(calls)
    again = run(trainer.model)
    assert len(calls) == n_calls
    assert torch.equal(again[0].log_probs, theirs[0].log_probs)


BATCHES = [
    pytest.param(dict(shift_labels=tokens(3, 12, ignored=0.4, seed=2)), id="shift-labels"),
    pytest.param(dict(num_items_in_batch=57), id="items"),
    pytest.param(dict(num_items_in_batch=torch.tensor(57)), id="items-tensor"),
    pytest.param(dict(labels=IDS), id="nothing-masked"),
    pytest.param(dict(labels=torch.full((3, 12), -100)), id="all-masked"),
    pytest.param(dict(attention_mask=torch.ones(3, 12, dtype=torch.long)), id="mask"),
    pytest.param(dict(input_ids=IDS[:, :1], labels=LABELS[:, :1]), id="one-token"),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("new_model", [llama, gemma2])
def test_any_batch(new_model, batch):
    trainer = Heads(new_model())
    theirs = run(trainer.model, **batch)
    assert_same(run(patch(trainer).model, **batch), theirs)


@pytest.mark.parametrize("asked", [(), *[(name,) for name in FIELDS]])
def test_what_is_not_asked_for_is_not_made(calls, asked):
    trainer = patch(Heads(llama(), outputs=asked))
    out, _ = run(trainer.model)
    made = {name for name in FIELDS if getattr(out, name) is not None}
    assert made == {"log_probs", *asked}
    needs_stats = not {"entropy", "is_top1", "log_sum_sq_probs"}.isdisjoint(asked)
    assert [kwargs["return_stats"] for _, kwargs in calls[:1]] == [needs_stats]
    assert len(calls) == 1 + ("log_sum_sq_probs" in asked)


@pytest.mark.parametrize("new_model", [llama, gemma2])
def test_log_probs_and_entropy_alone_have_gradients(new_model):
    out = patch(Heads(new_model())).model(**BATCH, fused_lm_head=True)
    assert {name for name in FIELDS if out[name].requires_grad} == {"log_probs", "entropy"}
    with torch.no_grad():
        out = patch(Heads(new_model())).model(**BATCH, fused_lm_head=True)
    assert not any(out[name].requires_grad for name in FIELDS)


def test_masked_positions_are_left_out(calls):
    run(patch(Heads(llama())).model)
    n_labels = (LABELS[:, 1:] != -100).sum().item()
    assert {hidden.shape[0] for hidden, _ in calls} == {n_labels} and n_labels < 33


def test_nothing_to_learn_is_a_zero_with_gradients():
    trainer = patch(Heads(llama()))
    out, gradients = run(trainer.model, labels=torch.full((3, 12), -100))
    assert out.loss == 0 and all(not gradient.any() for gradient in gradients)


# --- 16 bits ---

BFLOAT16 = [
    pytest.param(torch.bfloat16, None, {}, id="bfloat16"),
    pytest.param(torch.bfloat16, None, dict(cast_lm_head_to_fp32=True), id="float32-head"),
    pytest.param(torch.float32, torch.bfloat16, {}, id="autocast"),
    pytest.param(
        torch.float32, torch.bfloat16, dict(cast_lm_head_to_fp32=True), id="autocast-float32-head"
    ),
    pytest.param(torch.float16, None, {}, id="float16"),
]


def run_in(trainer, autocast):
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        return run(trainer.model)


@pytest.mark.parametrize("dtype, autocast, options", BFLOAT16)
@pytest.mark.parametrize("new_model", MODELS)
def test_16_bits_are_rounded_where_trl_rounds_them(new_model, dtype, autocast, options):
    """Gradients of 16 bits by twice their rounding: one is that of logits' gradients."""
    trainer = Heads(new_model().to(dtype), temperature=0.8, **options)
    (theirs, their_grads), (ours, our_grads) = (
        run_in(trainer, autocast), run_in(patch(trainer), autocast),
    )  # fmt: skip
    rounding = torch.finfo(autocast or dtype).eps
    is_exact = options or new_model is not phi  # which adds its bias to rounded products there
    for name in FIELDS:
        a, b = ours[name].float(), theirs[name].float()
        assert ours[name].dtype == theirs[name].dtype
        close = 2e-5 if is_exact and name != "mean_logits" else 4 * rounding
        if name == "is_top1":
            assert (a != b).sum() <= (0 if is_exact else 1)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=close * max(1.0, b.abs().max().item()))
    for a, b in zip(our_grads, their_grads, strict=True):
        assert a.dtype == b.dtype == dtype
        assert (a - b).double().norm() <= 2 * rounding * b.double().norm() + 1e-9


@pytest.mark.parametrize("options", [{}, dict(temperature=0.6)], ids=["plain", "temperature"])
@pytest.mark.parametrize("new_model", MODELS)
def test_logits_of_16_bits_may_be_float32(new_model, options):
    """The numbers of a float32 head on the same hidden states, from the 16-bit one."""
    model = new_model().bfloat16()
    wide = Heads(copy.deepcopy(model), cast_lm_head_to_fp32=True, **options)
    exact, _ = run(wide.model)
    trainer = Heads(model, **options)
    rounded, _ = run(patch(trainer).model)
    ours, gradients = run(patch(trainer, logits_dtype=torch.float32).model)
    for name in ("log_probs", "entropy", "log_sum_sq_probs"):
        error, their_error = (
            (out[name] - exact[name]).abs().max().item() for out in (ours, rounded)
        )
        assert error < 1e-5 and error < 0.1 * their_error
    torch.testing.assert_close(ours.mean_logits, exact.mean_logits, rtol=1e-4, atol=1e-5)
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


def test_float32_logits_of_autocast(calls):
    model = phi()
    trainer = patch(Heads(model), logits_dtype=torch.float32)
    run(trainer.model)
    assert calls.pop()[1]["logits_dtype"] is None  # nothing of 16 bits
    out, _ = run_in(trainer, torch.bfloat16)
    hidden, options = calls[-1]
    assert options["logits_dtype"] is torch.float32 and hidden.dtype == torch.bfloat16
    weight, bias = (of.bfloat16().double() for of in (model.lm_head.weight, model.lm_head.bias))
    logits = nn.functional.linear(hidden.double(), weight, bias)
    means = out.mean_logits[out.label_mask].double()
    torch.testing.assert_close(means, logits.mean(-1), rtol=1e-5, atol=1e-6)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(out.entropy[out.label_mask].double(), entropy, rtol=1e-5, atol=1e-6)


# --- rows out of the ordinary ---


def with_head(model, weight, bias):
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
        model.lm_head.bias.copy_(bias)
    return Heads(model)


def test_of_equal_logits_the_first_is_the_top():
    bias = torch.zeros(101)
    bias[[7, 40, 90]] = 1.0
    trainer = with_head(phi(), torch.zeros(101, 32), bias)
    labels = torch.tensor([[0, 7, 40, 90, 3, 7, 40, -100, 7, 0, 1, 2]])
    theirs, _ = run(trainer.model, input_ids=IDS[:1], labels=labels)
    ours, _ = run(patch(trainer).model, input_ids=IDS[:1], labels=labels)
    right = (labels == 7)[:, 1:]
    assert torch.equal(ours.is_top1, right) and torch.equal(theirs.is_top1, right)


@pytest.mark.parametrize("value", [-math.inf, math.nan], ids=["-inf", "nan"])
def test_no_logit_is_the_largest_where_all_are_the_same_nothing(value):
    trainer = with_head(phi(), torch.zeros(101, 32), torch.full((101,), value))
    labels = torch.tensor([[0, 0, 3, 100]])
    theirs = trainer.model(input_ids=IDS[:1, :4], labels=labels, fused_lm_head=True).is_top1
    ours = patch(trainer).model(input_ids=IDS[:1, :4], labels=labels, fused_lm_head=True).is_top1
    assert not theirs.any() and not ours.any()


def test_classes_that_cannot_be():
    """A bias of -inf, for the padding of a vocabulary: the entropy is a number here, NaN in TRL."""
    bias = torch.randn(101)
    bias[60:] = -math.inf
    trainer = with_head(phi(), 0.3 * torch.randn(101, 32), bias)
    labels = LABELS.where(LABELS < 60, -100)
    batch = dict(input_ids=IDS, labels=labels, fused_lm_head=True)
    with torch.no_grad():
        theirs, ours = trainer.model(**batch), patch(trainer).model(**batch)
    for name in ("log_probs", "log_sum_sq_probs", "mean_logits", "is_top1"):
        torch.testing.assert_close(ours[name], theirs[name])
    assert ours.entropy[ours.label_mask].min() > 0
    assert theirs.entropy[ours.label_mask].isnan().all()


@pytest.mark.parametrize("new_model, labels, error", [
    pytest.param(lambda: gemma2(final_logit_softcapping=0.0), LABELS, ValueError, id="no-cap"),
    pytest.param(llama, torch.full((3, 12), 101), IndexError, id="no-class"),
])  # fmt: skip
def test_what_has_no_meaning_is_an_error(new_model, labels, error):
    """And a number in TRL."""
    trainer = Heads(new_model())
    assert run(trainer.model, labels=labels)[0].loss.isfinite()
    with pytest.raises(error):
        run(patch(trainer).model, labels=labels)


# --- whose heads ---


def test_policy_and_reference_and_nobody_else(calls):
    other, trainer = Heads(llama(), llama()), Heads(llama(), llama())
    assert patch(trainer) is trainer
    for model, n_calls in ((other.model, 0), (other.ref_model, 0), (trainer.model, 2),
                           (trainer.ref_model, 4), (Heads(llama()).model, 4)):  # fmt: skip
        run(model)
        assert len(calls) == n_calls
    assert unpatch(trainer) is trainer
    run(trainer.model), run(trainer.ref_model)
    assert len(calls) == 4


def test_the_code_of_a_head_comes_back():
    trainer = Heads(llama(), llama())
    heads = [model.forward.__func__ for model in (trainer.model, trainer.ref_model)]
    before = [(head.__code__, dict(vars(head))) for head in heads]
    modules = vars(trainer.model).keys() | trainer.model.state_dict().keys()
    unpatch(patch(patch(trainer), logits_dtype=torch.float32))
    for head, (code, attributes) in zip(heads, before, strict=True):
        assert head.__code__ is code and vars(head) == attributes
    unpatch(trainer)
    assert heads[0].__code__ is before[0][0]
    assert modules == vars(trainer.model).keys() | trainer.model.state_dict().keys()


def test_patched_leaves_what_it_found(calls):
    trainer = Heads(llama(), outputs=("log_probs",))
    seen = []

    def kind():
        before = len(calls)
        with torch.autocast("cpu", torch.bfloat16):
            trainer.model(**BATCH, fused_lm_head=True)
        seen.append(calls[-1][1]["logits_dtype"] if len(calls) > before else "theirs")

    kind()
    with patched(trainer) as same:
        assert same is trainer
        kind()
        with patched(trainer, logits_dtype=torch.float32):
            kind()
        kind()
    kind()
    with pytest.raises(KeyError), patched(trainer):
        raise KeyError
    kind()
    patch(trainer, logits_dtype=torch.float32)
    with patched(trainer):
        kind()
    kind()
    assert seen == [
        "theirs", None, torch.float32, None, "theirs", "theirs", None, torch.float32
    ]  # fmt: skip


def test_a_head_given_later_is_trls_again(calls):
    trainer = patch(Heads(llama()))
    utils.add_fused_lm_head(trainer.model)
    run(trainer.model)
    assert not calls
    run(patch(trainer).model)
    assert len(calls) == 1


def test_without_a_head_the_model_is_itself(calls):
    model = llama()
    right = model(**BATCH)
    trainer = patch(Heads(model))
    out = model(**BATCH)
    assert torch.equal(out.logits, right.logits) and torch.equal(out.loss, right.loss)
    assert model.generate(IDS[:1], max_new_tokens=2, min_new_tokens=2).shape == (1, 14)
    assert trainer.model is model and not calls


def test_copies_are_patched(calls):
    run(copy.deepcopy(patch(Heads(llama())).model))
    assert calls


# --- what wraps them ---


def autocast_of_accelerate(model):
    """Its forward in two wrappers, the outputs in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


class LikePeft(nn.Sequential):
    """What `patch` has to know of PEFT, where that is not installed."""

    def get_base_model(self):
        return self[0]

    def forward(self, **kwargs):
        return self[0](**kwargs)


def with_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )


WRAPPERS = [
    pytest.param(autocast_of_accelerate, id="accelerate"),
    pytest.param(nn.DataParallel, id="data-parallel"),
    pytest.param(LikePeft, id="like-peft"),
    pytest.param(with_peft, id="peft"),
    pytest.param(lambda model: autocast_of_accelerate(with_peft(model)), id="accelerate-peft"),
]


@pytest.mark.parametrize("is_patched_first", [True, False], ids=["patched-first", "wrapped-first"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_models_in_other_libraries_wrappers(calls, wrap, is_patched_first):
    trainer = Heads(llama())
    if is_patched_first:
        patch(trainer)
    trainer.model = wrap(trainer.model)
    ours = run(patch(trainer).model)
    assert len(calls) == 2
    assert_same(ours, run(unpatch(trainer).model), rtol=2e-2)
    assert len(calls) == 2


@pytest.mark.slow
def test_of_one_graph():
    """TRL's own projection breaks it. The compiled model sees whether it is patched."""
    trainer, counter = Heads(llama()), CompileCounterWithBackend("eager")
    right = run(trainer.model)
    trainer.model = torch.compile(trainer.model, backend=counter, fullgraph=True)
    for turn in range(2):
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            run(trainer.model)
        with patched(trainer):
            assert_same(run(trainer.model), right)
        assert counter.frame_count == turn + 1
    patch(trainer)
    for length in (9, 7, 11):
        ids = tokens(3, length)
        run(trainer.model, input_ids=ids, labels=ids.where(torch.rand(3, length) < 0.5, -100))
    assert counter.frame_count == 3  # one more for any length


# --- weights that are not whole ---


def whole(found):
    """What `run` returns, its DTensors gathered."""
    out, gradients = found
    return out, [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", ["ddp", "fsdp2", "fsdp2-head"])
@on_ranks(2, backends=("cpu",))
def test_models_on_several_ranks(here, wrapped):
    """A head that is a group by itself is a DTensor when it is used; TRL gathers it."""
    trainer = Heads(llama())
    theirs = run(trainer.model)
    if wrapped == "ddp":
        trainer.model = nn.parallel.DistributedDataParallel(trainer.model)
    else:
        if wrapped == "fsdp2-head":
            fully_shard(trainer.model.lm_head)
        fully_shard(trainer.model)
    assert_same(whole(run(trainer.model)), theirs)
    called = []
    function = integration.fused_linear_cross_entropy
    with pytest.MonkeyPatch.context() as monkeypatch, patched(trainer):
        monkeypatch.setattr(
            integration,
            "fused_linear_cross_entropy",
            lambda *args, **options: called.append(1) or function(*args, **options),
        )
        assert_same(whole(run(trainer.model)), theirs)
    assert called


def test_shards_of_zero_3_stay_with_trl(calls):
    """Its projection gathers them again in backward."""
    trainer = Heads(llama())
    theirs = run(trainer.model)
    trainer.model.lm_head.weight.ds_id = 0
    assert_same(run(patch(trainer).model), theirs)
    assert not calls
    with pytest.raises(TypeError, match="logits_dtype must be None where ZeRO-3"):
        run(patch(trainer, logits_dtype=torch.float32).model)


# --- who is refused ---


def of_plain_models():
    trainer = Heads(llama(), llama())
    trainer.ref_model = llama()
    return trainer


def test_refuses_what_has_no_fused_head():
    trainer = of_plain_models()
    head = trainer.model.forward.__func__
    code = head.__code__
    message = f"got Heads with trl {trl.__version__}, whose LlamaForCausalLM has none"
    for function in (patch, unpatch, lambda trainer: patched(trainer).__enter__()):
        with pytest.raises(TypeError, match=message):
            function(trainer)
        assert head.__code__ is code


@pytest.mark.parametrize("what, name", [("trainer", "str"), (llama(), "LlamaForCausalLM")])
def test_refuses_what_is_no_trainer(what, name):
    with pytest.raises(TypeError, match=f"need a trainer of trl>=1.15, got {name}"):
        patch(what)


@pytest.mark.parametrize("value", [torch.bfloat16, torch.float64, "float32"], ids=str)
def test_refuses_other_dtypes(value):
    with pytest.raises(TypeError, match="logits_dtype must be None or torch.float32, got"):
        patch(Heads(llama()), logits_dtype=value)


def other_arguments(monkeypatch, trainer):
    def forward(ctx, hidden, weight, bias, targets, temperature, mask):
        raise AssertionError

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "forward", staticmethod(forward))


def other_outputs(monkeypatch, trainer):
    module = importlib.import_module(utils._ChunkedLogProbFunction.__module__)
    monkeypatch.setattr(module, "OPTIONAL_OUTPUTS", (*module.OPTIONAL_OUTPUTS, "variance"))


def other_name(monkeypatch, trainer):
    head = trainer.model.forward.__func__
    names = tuple(name.replace("_Chunked", "_Tiled") for name in head.__code__.co_names)
    head.__code__ = head.__code__.replace(co_names=names)


@pytest.mark.parametrize("change", [other_arguments, other_outputs, other_name])
def test_refuses_a_trl_whose_head_is_another(monkeypatch, change):
    trainer = Heads(llama())
    change(monkeypatch, trainer)
    code = trainer.model.forward.__func__.__code__
    with pytest.raises(ImportError, match=f"as 1.15 and 1.16, got trl {trl.__version__}"):
        patch(trainer)
    assert trainer.model.forward.__func__.__code__ is code


def test_refuses_a_trl_without_fused_heads(monkeypatch):
    monkeypatch.delattr(utils, "add_fused_lm_head")
    spec = importlib.util.spec_from_file_location("copy_of_trl", integration.__file__)
    with pytest.raises(ImportError, match=f"need trl>=1.15, .* got trl {trl.__version__}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
