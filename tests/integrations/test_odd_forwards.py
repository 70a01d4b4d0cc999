"""Deferred logits where forwards do not run as they stand: compilers, checkpoints, interrupts."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='pip install "fused_ce[hf]"')

from models import VOCAB_SIZE, assert_close, batch, loss_and_gradients, tiny  # noqa: E402
from test_deferred import F, a_head, gradients  # noqa: E402

from fused_ce.integrations.deferred import DeferredLogits  # noqa: E402
from fused_ce.integrations.transformers import patch  # noqa: E402

# --- compilers ---


@pytest.mark.parametrize("use", [
    pytest.param(lambda x: x * 2.0 / 4.0, id="times-and-divided"),
    pytest.param(lambda x: torch.tanh(x / 3.0) * 3.0, id="cap"),
    pytest.param(lambda x: x[:, 1:].float() * 2.0 + 1.0, id="scaled-and-looked-at"),
])  # fmt: skip
def test_compiled_functions_see_the_real_logits(use):
    torch._dynamo.reset()
    leaves = a_head()
    compiled = torch.compile(use, backend="eager")
    ours = gradients(DeferredLogits.of, lambda x: compiled(x).clone(), leaves)
    for a, b in zip(ours, gradients(F.linear, use, leaves), strict=True):
        torch.testing.assert_close(a, b)


class Broken(transformers.LlamaForCausalLM):
    """Its graph breaks between head and loss, as one does where a function is not traced."""

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = logits * 2.0
        torch._dynamo.graph_break()
        logits = logits / 4.0
        loss = self.loss_function(logits, labels, VOCAB_SIZE)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.slow
def test_compiled_models_whose_head_is_not():
    torch._dynamo.reset()
    rights = loss_and_gradients(tiny(kind=Broken), **batch())
    model = patch(tiny(kind=Broken), fuse_head=True)
    model.lm_head.forward = torch.compiler.disable(model.lm_head.forward)
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(loss_and_gradients(compiled, **batch()), rights)


# --- checkpoints ---


class Recomputed(transformers.LlamaForCausalLM):
    """Its head is called where nothing is recorded, and has gradients all the same."""

    use_reentrant = True
    change = staticmethod(lambda logits: logits)

    def forward(self, input_ids, labels=None):
        hidden = self.model(input_ids).last_hidden_state
        logits = torch.utils.checkpoint.checkpoint(
            lambda x: self.change(self.lm_head(x)), hidden, use_reentrant=self.use_reentrant
        )
        # A penalty, without which a lost gradient would be an error of backward.
        loss = self.loss_function(logits, labels, VOCAB_SIZE) + hidden.square().mean()
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def masked_in_place(logits):
    logits[:, :, 5] = -30.0
    return logits


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("change", [
    pytest.param(lambda logits: logits, id="alone"),
    pytest.param(lambda logits: logits * 0.5, id="scaled"),
    pytest.param(masked_in_place, id="masked-in-place"),
])  # fmt: skip
def test_a_head_in_a_checkpoint(use_reentrant, change):
    model, given = tiny(kind=Recomputed), batch()
    model.use_reentrant, model.change = use_reentrant, change
    rights = loss_and_gradients(model, **given)
    assert_close(loss_and_gradients(patch(model, fuse_head=True), **given), rights)


# --- interrupts ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_forward_leaves_no_loss_due(error):
    def interrupt(*_):
        raise error

    model = patch(tiny(), fuse_head=True)
    hook = model.model.register_forward_hook(interrupt)
    with pytest.raises(error):
        model(**batch())
    hook.remove()
    assert type(model.lm_head(torch.ones(1, 1, 32))) is torch.Tensor
    assert_close(loss_and_gradients(model, **batch()), loss_and_gradients(tiny(), **batch()))


def test_a_forward_that_was_replaced_defers_too():
    """As Accelerate replaces it in `prepare`."""
    model = tiny()
    model.forward = model.forward
    assert not patch(model, fuse_head=True)(**batch()).logits.is_made()
