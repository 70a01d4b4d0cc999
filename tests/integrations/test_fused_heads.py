"""transformers without logits: the loss of `patch(model)`, from hidden states."""

import copy
import pickle

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason='pip install "fused_ce[hf]"')

from models import MODELS, VOCAB_SIZE, assert_close, batch, loss_and_gradients, tiny, tokens  # noqa: E402

import fused_ce  # noqa: E402
from fused_ce.integrations import transformers as integration  # noqa: E402
from fused_ce.integrations.deferred import DeferredLogits  # noqa: E402
from fused_ce.integrations.transformers import causal_lm_loss, patch, patched, unpatch  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """The keywords of each loss without logits, in order; those of logits are an error."""
    seen = []

    def remember(*args, **kwargs):
        seen.append(kwargs)
        return fused_ce.fused_linear_cross_entropy(*args, **kwargs)

    def wrong(*args, **kwargs):
        raise AssertionError("a loss of logits")

    monkeypatch.setattr(integration, "fused_linear_cross_entropy", remember)
    monkeypatch.setattr(integration, "fused_cross_entropy", wrong)
    return seen


def is_pending(outputs):
    return isinstance(outputs.logits, DeferredLogits) and not outputs.logits.is_made()


# --- every architecture ---


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_library(calls, name):
    model = tiny(name)
    given = batch()
    theirs = loss_and_gradients(model, **given)
    logits = model(**given).logits.detach()
    patch(model, fuse_head=True)
    assert_close(loss_and_gradients(model, **given), theirs)
    assert len(calls) == 1
    outputs = model(**given)
    assert is_pending(outputs)
    assert torch.equal(outputs.logits.detach(), logits)
    assert unpatch(model) is model
    assert type(model.get_output_embeddings()) is nn.Linear
    assert_close(loss_and_gradients(model, **given), theirs, rounding=1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(name, dtype):
    """As exact as the loss of logits: beside float32 of the same weights."""
    given = batch()
    exact = loss_and_gradients(tiny(name).to(dtype).float(), **given)
    errors = []
    for fuse_head in (True, False):
        model = patch(tiny(name).to(dtype), fuse_head=fuse_head)
        found = loss_and_gradients(model, **given)
        assert found[0].dtype == torch.float32
        pairs = [(a, b) for a, b in zip(found, exact, strict=True) if b.abs().max() > 1e-6]
        errors.append(max((a - b).abs().max() / b.abs().max() for a, b in pairs))
    assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("given", [
    pytest.param(dict(shift_labels=tokens(3, 12, seed=2)), id="shift-labels"),
    pytest.param(dict(num_items_in_batch=57), id="items"),
    pytest.param(dict(num_items_in_batch=torch.tensor(57)), id="items-tensor"),
    pytest.param(dict(return_dict=False), id="tuple"),
    pytest.param(dict(output_hidden_states=True), id="hidden-states"),
])  # fmt: skip
def test_what_a_forward_is_given(calls, name, given):
    model = tiny(name)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch(**given))[0]
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
        patch(model, fuse_head=True)
    assert_close(*found[::-1])
    assert len(calls) == 1


def test_labels_without_names_are_seen_too(calls):
    model = patch(tiny(), fuse_head=True)
    given = batch()
    by_place = model(given["input_ids"], None, None, None, None, given["labels"])
    assert is_pending(by_place) and len(calls) == 1
    assert by_place.loss == model(**given).loss


# --- where no loss is due ---


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_without_labels_logits_are_as_ever(name):
    model = tiny(name).eval()
    right = model(input_ids=tokens(3, 12)).logits
    cut = dict(input_ids=tokens(1, 4), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    written = model.generate(**cut)
    patch(model, fuse_head=True)
    for given in ({}, dict(labels=None), dict(shift_labels=tokens(3, 12))):
        logits = model(input_ids=tokens(3, 12), **given).logits
        assert type(logits) is torch.Tensor and torch.equal(logits, right)
    assert torch.equal(model.generate(**cut), written)
    assert type(model.lm_head(torch.ones(1, 1, 32))) is torch.Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(calls, mode):
    model, given = tiny().eval(), batch()
    with mode():
        theirs = model(**given)
        ours = patch(model, fuse_head=True)(**given)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert is_pending(ours) and not ours.loss.requires_grad
    assert torch.equal(ours.logits.argmax(-1), theirs.logits.argmax(-1))


def test_an_error_in_a_forward_leaves_no_loss_due():
    model = patch(tiny(), fuse_head=True)
    with pytest.raises(ValueError, match="a row of"):
        model(input_ids=tokens(3, 12), labels=tokens(3, 11))
    assert type(model.lm_head(torch.ones(1, 1, 32))) is torch.Tensor


def test_another_model_inside_is_not_concerned():
    class WithTeacher(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            self.seen = [teacher(input_ids=kwargs["input_ids"]).logits for teacher in self.teachers]
            return super().forward(*args, **kwargs)

    model = patch(tiny(kind=WithTeacher), fuse_head=True)
    vars(model)["teachers"] = tiny(seed=1), patch(tiny(seed=2), fuse_head=True)
    assert is_pending(model(**batch()))
    assert [type(logits) for logits in model.seen] == [torch.Tensor] * 2


# --- models that do something else to their logits ---


class Odd(transformers.LlamaForCausalLM):
    """Its logits are what `change` makes of them."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.change(self.lm_head(self.model(input_ids).last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, logits.shape[-1], **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def masked_in_place(logits):
    logits[:, :, 5] = -30.0
    return logits


def added_in_place(logits):
    logits += torch.linspace(-1, 1, logits.shape[-1])
    return logits


def looked_at(logits):
    assert (logits.argmax(-1) >= 0).all()
    return logits


ODD = [
    pytest.param(lambda x: torch.where(torch.arange(VOCAB_SIZE) % 7 > 0, x, -30.0), id="where"),
    pytest.param(lambda x: torch.cat([x[:, :6], x[:, 6:] * 2], 1), id="concatenation"),
    pytest.param(lambda x: torch.cat([x, x[..., :3]], -1), id="more-classes"),
    pytest.param(added_in_place, id="in-place-addition"),
    pytest.param(masked_in_place, id="in-place-mask"),
    pytest.param(looked_at, id="looked-at"),
    pytest.param(lambda x: x + x.mean(-1, keepdim=True), id="a-mean"),
    pytest.param(lambda x: x.clamp(-1, 1), id="clamp"),
    pytest.param(lambda x: x * torch.linspace(0.5, 2, VOCAB_SIZE), id="a-factor-per-class"),
    pytest.param(lambda x: x.masked_fill(torch.arange(VOCAB_SIZE) == 3, -30.0), id="masked"),
    pytest.param(lambda x: x.log_softmax(-1), id="log-probabilities"),
    pytest.param(lambda x: x[..., : VOCAB_SIZE - 1], id="padded-vocabulary"),
    pytest.param(lambda x: x.flip(1), id="flipped"),
    pytest.param(lambda x: x * 0.0, id="nothing"),
    pytest.param(lambda x: x.tanh().tanh(), id="two-caps"),
    pytest.param(lambda x: x.tanh() * -3.0, id="a-negative-cap"),
]
USUAL = [
    pytest.param(lambda x: x.float() * 0.3, id="scale"),
    pytest.param(lambda x: torch.tanh(x / 0.7) * 0.7, id="cap"),
    pytest.param(lambda x: x[:, 2:], id="slice"),
    pytest.param(lambda x: x[:, 2:].contiguous().float(), id="slice-copied"),
]


@pytest.mark.parametrize("change, is_remembered", [
    *(pytest.param(case.values[0], False, id=case.id) for case in ODD),
    *(pytest.param(case.values[0], True, id=case.id) for case in USUAL),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_may_do_anything_to_its_logits(change, is_remembered, dtype):
    model = tiny(kind=Odd).to(dtype)
    model.change = change
    given = batch()
    length = change(torch.zeros(3, 12, VOCAB_SIZE)).shape[1]
    given["labels"] = given["labels"][:, :length] % (VOCAB_SIZE - 1)
    rights = loss_and_gradients(patch(model), **given)
    patch(model, fuse_head=True)
    assert_close(loss_and_gradients(model, **given), rights, 1e-6 if dtype.itemsize > 2 else 2e-2)
    assert is_pending(model(**given)) is is_remembered


def test_a_hook_that_changes_logits_is_obeyed():
    model, given = tiny(), batch()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2 + 1)
    rights = loss_and_gradients(model, **given)
    assert_close(loss_and_gradients(patch(model, fuse_head=True), **given), rights)
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    rights = loss_and_gradients(model, **given)
    assert_close(loss_and_gradients(patch(model, fuse_head=True), **given), rights)
    assert is_pending(model(**given))


def test_a_hook_for_the_gradient_of_the_head_is_called():
    seen = []
    model = patch(tiny(), fuse_head=True)
    model.lm_head.register_full_backward_hook(lambda head, given, grad: seen.append(grad[0]))
    rights = loss_and_gradients(tiny(), **batch())
    assert_close(loss_and_gradients(model, **batch()), rights)
    assert seen[0].shape == (3, 12, VOCAB_SIZE) and seen[0].abs().sum() > 0


def test_gradients_through_loss_and_logits():
    model, given = tiny(), batch()
    found = []
    for _ in range(2):
        model.zero_grad()
        outputs = model(**given)
        loss = outputs.loss * 1.3 + outputs.logits.logsumexp(-1).square().mean()
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
        patch(model, fuse_head=True)
    assert_close(*found[::-1])


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_logits_after_a_step_are_an_error(kind):
    model = patch(tiny(), fuse_head=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **{kind: True})
    outputs = model(**batch())
    outputs.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="head's weight changed since, in an optimizer's step"):
        outputs.logits.argmax(-1)
    model.lm_head.requires_grad_(False)
    frozen = torch.optim.AdamW(model.model.parameters(), **{kind: True})
    outputs = model(**batch())
    outputs.loss.backward()
    frozen.step()
    assert outputs.logits.isfinite().all()


# --- options ---


def test_options_pass_through(calls):
    model = patch(tiny(), fuse_head=True, logits_dtype=torch.float32, skip_ignored=True)
    model(**batch())
    assert calls[0]["logits_dtype"] == torch.float32 and calls[0]["skip_ignored"] is True
    patch(model, fuse_head=True)(**batch())
    assert calls[1]["logits_dtype"] is None and calls[1]["skip_ignored"] is None


def test_logits_in_float32():
    """Of a head of 16 bits: what rounding of logits loses is not lost."""
    given = batch()
    exact = tiny(initializer_range=0.5).bfloat16()
    hidden = exact.model(given["input_ids"]).last_hidden_state
    logits = (hidden.double() @ exact.lm_head.weight.double().T).float()
    right = causal_lm_loss(logits, given["labels"], VOCAB_SIZE)
    errors = [
        abs(patch(exact, fuse_head=True, **options)(**given).loss - right) / right
        for options in ({}, dict(logits_dtype=torch.float32))
    ]
    assert errors[1] < 1e-6 < errors[0]


@pytest.mark.parametrize("fuse_head", [True, False])
def test_stats(fuse_head):
    model, given = tiny("gemma2"), batch()
    logits = model(**given).logits
    patch(model, fuse_head=fuse_head, return_stats=True)
    assert model.loss_stats is None
    outputs = model(**given)
    stats = model.loss_stats
    assert isinstance(stats, fused_ce.CrossEntropyStats)
    targets = nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    counts = targets >= 0
    rights = torch.distributions.Categorical(logits=logits).entropy() * counts
    torch.testing.assert_close(stats.entropy, rights)
    torch.testing.assert_close(stats.losses.sum() / counts.sum(), outputs.loss)
    assert torch.equal(stats.predictions[counts], logits.argmax(-1)[counts])
    assert (stats.predictions[~counts] == -1).all()
    # What policy gradients need: a bonus for entropy, beside the loss.
    objective = outputs.loss - 0.3 * stats.entropy.mean()
    ours = torch.autograd.grad(objective, list(model.parameters()))
    plain = unpatch(model)(**given)
    entropy = torch.distributions.Categorical(logits=plain.logits).entropy() * counts
    theirs = torch.autograd.grad(plain.loss - 0.3 * entropy.mean(), list(model.parameters()))
    assert_close(ours, theirs, rounding=1e-5)


def test_stats_are_no_obstacle_to_copies():
    model = patch(tiny(), fuse_head=True, return_stats=True)
    model(**batch())
    assert model.loss_stats is not None
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.loss_stats is None
        again(**batch())
        assert again.loss_stats is not None and again.loss_stats is not model.loss_stats
    assert not hasattr(unpatch(model), "loss_stats")


@pytest.mark.parametrize("options, error, message", [
    (dict(fuse_head=1), TypeError, "fuse_head must be True or False, got 1"),
    (dict(return_stats=None), TypeError, "return_stats must be True or False, got None"),
    (dict(fuse_head=True, skip_ignored="yes"), TypeError, "skip_ignored .* got 'yes'"),
    (dict(fuse_head=True, logits_dtype="float32"), TypeError, "logits_dtype .* got 'float32'"),
    (dict(logits_dtype=torch.float32), ValueError, "logits_dtype .* needs fuse_head=True"),
    (dict(skip_ignored=True), ValueError, "skip_ignored .* needs fuse_head=True"),
])  # fmt: skip
def test_options_are_checked(options, error, message):
    model = tiny()
    before = dict(vars(model))
    with pytest.raises(error, match=message):
        patch(model, **options)
    with pytest.raises(error, match=message), patched(model, **options):
        pytest.fail("entered")
    assert vars(model) == before


class InFloat32(transformers.LlamaForCausalLM):
    """Its head is outside of autocast, its loss is not."""

    def forward(self, input_ids, labels=None):
        hidden = self.model(input_ids).last_hidden_state
        with torch.autocast("cpu", enabled=False):
            logits = self.lm_head(hidden.float())
        return transformers.modeling_outputs.CausalLMOutput(
            loss=self.loss_function(logits, labels, VOCAB_SIZE), logits=logits
        )


def test_autocast_of_the_head_counts_for_the_loss(calls):
    found = []
    for _ in range(2):
        model = tiny(kind=InFloat32, initializer_range=0.5)
        if found:
            patch(model, fuse_head=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(model(**batch()).loss)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    assert len(calls) == 1


class Frozen(transformers.LlamaForCausalLM):
    """Nothing is to be learnt through its logits."""

    def forward(self, input_ids, labels=None):
        with torch.no_grad():
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = self.loss_function(logits, labels, VOCAB_SIZE)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_a_head_without_gradients_has_a_loss_without_them(calls):
    outputs = patch(tiny(kind=Frozen), fuse_head=True)(**batch())
    assert len(calls) == 1 and not outputs.loss.requires_grad
    assert not outputs.logits.sum().requires_grad
