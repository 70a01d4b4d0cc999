"""Models without logits in other hands: copies, PEFT, autocast, checkpoints, ranks, trainers."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason='pip install "fused_ce[hf]"')

from models import (  # noqa: E402
    VOCAB_SIZE,
    assert_close,
    batch,
    dataset,
    loss_and_gradients,
    tiny,
    tokens,
)
from ranks import on_ranks  # noqa: E402
from test_cpu import peak_memory  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from fused_ce.integrations.deferred import DeferredLogits  # noqa: E402
from fused_ce.integrations.transformers import patch, patched, unpatch  # noqa: E402

# What others do with a model does not depend on who computes the loss. Slow: two processes that
# import transformers.
HERE = ("cpu",)


def is_pending(outputs):
    return isinstance(outputs.logits, DeferredLogits) and not outputs.logits.is_made()


# --- memory ---


class Largest(TorchDispatchMode):
    """The memory of the largest tensor that any operator returns."""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run, and look at the results."""
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        self.n_bytes = max([self.n_bytes, *(t.untyped_storage().nbytes() for t in tensors)])
        return results


WIDE = dict(vocab_size=2000, hidden_size=16, intermediate_size=16, max_position_embeddings=4096)


def step(model, given):
    outputs = model(**given)
    outputs.loss.backward()
    return outputs


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_no_tensor_is_a_quarter_of_the_logits(name):
    wide = dict(vocab_size=2000, n_positions=4096) if name == "gpt2" else WIDE
    given = dict(input_ids=tokens(64, 64), labels=tokens(64, 64, seed=1))
    logits = 64 * 64 * 2000 * 4
    found = {}
    for fuse_head in (True, False):
        model = patch(tiny(name, **wide), fuse_head=fuse_head)
        with Largest() as largest:
            step(model, given)
        found[fuse_head] = largest.n_bytes
    assert found[True] < logits / 4 < logits <= found[False]


def test_peak_memory_is_that_of_a_chunk():
    """Of allocated bytes in a step, the operator's own included."""
    given = dict(input_ids=tokens(8, 512), labels=tokens(8, 512, seed=1))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each has some scratch memory
    peaks = []
    try:
        for options in (dict(fuse_head=True), {}, None):
            model = tiny("llama", **WIDE)
            model = model if options is None else patch(model, **options)
            peaks.append(peak_memory(lambda model=model: step(model, given)))
    finally:
        torch.set_num_threads(n_threads)
    logits = 8 * 512 * 2000 * 4
    fused, plain, library = (peak / logits for peak in peaks)
    assert fused < plain - 1.7 and plain < library - 0.9


# --- copies, files ---


@pytest.mark.parametrize("duplicate", [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
    pytest.param(copy.copy, id="copy"),
])  # fmt: skip
def test_copies_are_patched_and_can_be_unpatched(duplicate):
    model = tiny("gpt2")
    again = duplicate(patch(model, fuse_head=True, return_stats=True))
    assert type(again).__name__ == "GPT2LMHeadModel" and isinstance(again, type(tiny("gpt2")))
    assert is_pending(again(**batch())) and again.loss_stats is not None
    assert again.lm_head.weight is again.transformer.wte.weight
    unpatch(again)
    assert type(again) is transformers.GPT2LMHeadModel and type(again.lm_head) is nn.Linear
    assert type(again(**batch()).logits) is torch.Tensor
    if duplicate is not copy.copy:
        assert is_pending(model(**batch()))


def test_saved_models_are_not_patched(tmp_path):
    model = tiny("gpt2")
    model.save_pretrained(tmp_path / "before")
    patch(model, fuse_head=True)
    model(**batch())
    model.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        files = [tmp_path / folder / name for folder in ("before", "after")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "after")
    assert type(loaded) is transformers.GPT2LMHeadModel and type(loaded.lm_head) is nn.Linear
    rights = loss_and_gradients(loaded, **batch())
    assert_close(loss_and_gradients(model, **batch()), rights)
    assert list(model.state_dict()) == list(loaded.state_dict())


def test_what_patch_has_done_can_be_undone():
    model = tiny()
    before, printed = dict(vars(model)), repr(model)
    patch(model, fuse_head=True)
    assert repr(model) == printed
    assert patch(model, fuse_head=True) is model
    patch(model)
    assert type(model) is transformers.LlamaForCausalLM and type(model.lm_head) is nn.Linear
    with patched(model, fuse_head=True, return_stats=True):
        assert is_pending(model(**batch()))
        with patched(model):
            assert type(model(**batch()).logits) is torch.Tensor
        assert is_pending(model(**batch())) and model.loss_stats is not None
    assert type(model(**batch()).logits) is torch.Tensor
    assert vars(unpatch(model)) == before and type(model) is transformers.LlamaForCausalLM
    other = tiny()
    assert type(other.lm_head) is nn.Linear and type(other(**batch()).logits) is torch.Tensor


def test_a_head_that_comes_later_defers_too():
    model = patch(tiny(), fuse_head=True)
    model.resize_token_embeddings(VOCAB_SIZE + 7)
    assert is_pending(model(**batch()))
    model.set_output_embeddings(nn.Linear(32, VOCAB_SIZE + 7, bias=False))
    rights = loss_and_gradients(patch(model), **batch())
    assert_close(loss_and_gradients(patch(model, fuse_head=True), **batch()), rights)
    assert is_pending(model(**batch()))


# --- heads that cannot be fused ---


class Quantised(nn.Linear):
    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.round(decimals=2), self.bias)


def with_head(head):
    model = tiny()
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize("new, message", [
    pytest.param(lambda: with_head(None), "output embedding, got LlamaForCausalLM", id="none"),
    pytest.param(lambda: with_head(Quantised(32, VOCAB_SIZE)), "got Quantised in", id="quantised"),
    pytest.param(
        lambda: with_head(nn.Sequential(nn.Linear(32, VOCAB_SIZE))), "got Sequential", id="more"
    ),
])  # fmt: skip
def test_heads_that_are_refused(new, message):
    model = new()
    before, cls = dict(vars(model)), type(model)
    with pytest.raises(TypeError, match=f"{message}"):
        patch(model, fuse_head=True)
    assert vars(model) == before and type(model) is cls


def test_quantised_weights_and_parametrisations_make_logits():
    model = patch(tiny(), fuse_head=True)
    nn.utils.parametrizations.weight_norm(model.lm_head)
    rights = loss_and_gradients(unpatch(model), **batch())
    with pytest.raises(TypeError, match="got Parametrized.*Linear"):
        patch(model, fuse_head=True)
    model = patch(tiny(), fuse_head=True)
    nn.utils.parametrizations.weight_norm(model.lm_head)  # after patch: made, and right
    assert_close(loss_and_gradients(model, **batch()), rights)
    assert type(model(**batch()).logits) is torch.Tensor


@pytest.mark.parametrize("when", ["before", "between"])
def test_empty_weights_are_an_error(when):
    """ZeRO-3 leaves none of them, but while a module runs."""
    model = patch(tiny(), fuse_head=True)
    if when == "before":
        model.lm_head.weight.data = torch.empty(0)
    else:
        model.lm_head.register_forward_hook(
            lambda head, args, output: setattr(head.weight, "data", torch.empty(0))
        )
    with pytest.raises(ValueError, match="fuse_head=True .* head's weight whole"):
        model(**batch())


# --- PEFT ---


def lora(model, **further):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = dict(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, peft.LoraConfig(**options | further))


def adapter_gradients(model, given):
    model.zero_grad()
    outputs = model(**given)
    outputs.loss.backward()
    grads = [weight.grad for weight in model.parameters() if weight.requires_grad]
    return [outputs.loss.detach(), *grads], outputs


PEFT = [
    pytest.param({}, True, id="lora-on-the-body"),
    pytest.param(dict(target_modules=["q_proj", "lm_head"]), False, id="lora-on-the-head"),
    pytest.param(dict(modules_to_save=["lm_head"]), True, id="a-trained-copy-of-the-head"),
]


@pytest.mark.parametrize("further, is_deferred", PEFT)
@pytest.mark.parametrize("first", ["patch", "peft"])
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*")
def test_peft(further, is_deferred, first):
    given = batch()
    rights, _ = adapter_gradients(lora(tiny(), **further), given)
    if first == "patch":
        model = lora(patch(tiny(), fuse_head=True), **further)
    else:
        model = lora(tiny(), **further)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert patch(model, fuse_head=True) is model
        texts = [str(warning.message) for warning in said]
        assert any("adds to its logits" in text for text in texts) is not is_deferred
    ours, outputs = adapter_gradients(model, given)
    assert_close(ours, rights)
    assert is_pending(outputs) is is_deferred
    with model.disable_adapter():
        torch.testing.assert_close(model(**given).loss, tiny()(**given).loss)
        assert is_pending(model(**given))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**given).loss, rights[0])


# --- autocast, checkpoints, accumulation ---


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_autocast(name):
    found = []
    for fuse_head in (True, False):
        model = patch(tiny(name), fuse_head=fuse_head)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(**batch())
            assert outputs.logits.dtype == torch.bfloat16
            assert not fuse_head or is_pending(outputs)
        outputs.loss.backward()
        found.append([outputs.loss.detach(), *(weight.grad for weight in model.parameters())])
        assert all(grad.dtype == torch.float32 for grad in found[-1])
    assert_close(*found, rounding=2e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_checkpointing(use_reentrant):
    rights = loss_and_gradients(tiny(), **batch())
    model = patch(tiny(), fuse_head=True).train()
    model.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
    assert_close(loss_and_gradients(model, **batch()), rights)
    model = patch(tiny(), fuse_head=True)  # all of the model, head and loss too
    loss = torch.utils.checkpoint.checkpoint(
        lambda given: model(**given).loss, batch(), use_reentrant=False
    )
    loss.backward()
    assert_close([loss.detach(), *(weight.grad for weight in model.parameters())], rights)


def test_accumulation():
    given = batch(6)
    n_items = (given["labels"][:, 1:] >= 0).sum()
    rights = loss_and_gradients(tiny(), **given)
    model = patch(tiny(), fuse_head=True)
    loss = 0.0
    for at in range(0, 6, 2):
        part = {name: value[at : at + 2] for name, value in given.items()}
        share = model(**part, num_items_in_batch=n_items).loss
        share.backward()
        loss += share.detach()
    assert_close([loss, *(weight.grad for weight in model.parameters())], rights)


class Gathered(torch.autograd.Function):
    """As DataParallel brings together what its replicas return."""

    @staticmethod
    def forward(ctx, *parts):
        return torch.cat([part.view_as(part) if part.dim() else part[None] for part in parts])

    @staticmethod
    def backward(ctx, grad):
        return (*grad.chunk(2),)


def replicas(model):
    """As torch.nn.parallel.replicate makes them, which does so on GPUs alone."""
    for _ in range(2):
        copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
        for module, twin in copies.items():
            for key, child in module._modules.items():
                twin._modules[key] = copies.get(child)
            for key, weight in module._parameters.items():
                setattr(twin, key, None if weight is None else weight.view_as(weight))
        yield copies[model]


def test_replicas_in_threads():
    model, given = patch(tiny(), fuse_head=True), batch(4)
    del given["labels"]
    given["shift_labels"] = tokens(4, 12, seed=5)
    outputs = [None, None]

    def run(at, replica):
        part = {name: value[2 * at : 2 * at + 2] for name, value in given.items()}
        outputs[at] = replica(**part, labels=part["input_ids"])

    threads = [threading.Thread(target=run, args=args) for args in enumerate(replicas(model))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(map(is_pending, outputs))
    loss = Gathered.apply(*(output.loss for output in outputs)).mean()
    logits = Gathered.apply(*(output.logits for output in outputs))
    (loss + logits.square().mean()).backward()
    plain = tiny()
    right = plain(**given, labels=given["input_ids"])
    (right.loss + right.logits.square().mean()).backward()
    assert torch.equal(logits.detach(), right.logits.detach())
    ours, theirs = ([weight.grad for weight in m.parameters()] for m in (model, plain))
    assert_close(ours, theirs)


# --- ranks ---


def of_rank(here, given):
    n = given["input_ids"].shape[0] // here.n_ranks
    return {key: value[here.rank * n : (here.rank + 1) * n] for key, value in given.items()}


def all_ranks(given):
    """Each rank has as many labels, so that the mean of losses is the loss of all."""
    given["labels"] = given["labels"].clamp(min=3)
    return given


@on_ranks(2, backends=HERE)
def test_ddp(here, find_unused):
    given = all_ranks(batch(4))
    rights = loss_and_gradients(tiny("gpt2"), **given)
    model = nn.parallel.DistributedDataParallel(tiny("gpt2"), find_unused_parameters=find_unused)
    patch(model, fuse_head=True)
    for _ in range(2):
        model.zero_grad()
        outputs = model(**of_rank(here, given))
        outputs.loss.backward()
        assert is_pending(outputs)
    assert_close([w.grad for w in model.parameters()], rights[1:])


test_ddp = pytest.mark.slow(pytest.mark.parametrize("find_unused", [False, True])(test_ddp))


@on_ranks(2, backends=HERE)
def test_fsdp2(here, first, reshard):
    from torch.distributed.fsdp import fully_shard

    given = all_ranks(batch(4))
    model = tiny("llama-tied")
    rights = loss_and_gradients(model, **given)
    right = model(**of_rank(here, given)).logits.detach()
    if first == "patch":
        patch(model, fuse_head=True)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=reshard)
    if first == "shard":
        patch(model, fuse_head=True)
    model.zero_grad()
    for _ in range(2):
        model.zero_grad()
        outputs = model(**of_rank(here, given))
        assert is_pending(outputs)
        if not reshard:
            assert torch.equal(outputs.logits.detach(), right)
        outputs.loss.backward()
    assert_close([w.grad.full_tensor() for w in model.parameters()], rights[1:])
    if reshard:
        outputs = model(**of_rank(here, given))
        with pytest.raises(ValueError, match="head's weight whole"):
            outputs.logits.sum()
    unpatch(model)
    assert type(model(**of_rank(here, given)).logits) is torch.Tensor


test_fsdp2 = pytest.mark.slow(pytest.mark.parametrize("first, reshard", [
    ("patch", False), ("shard", False), ("patch", True),
])(test_fsdp2))  # fmt: skip


@pytest.mark.slow
@on_ranks(2, backends=HERE)
def test_fsdp2_with_a_group_of_the_head(here):
    """Its weight is gone before the loss is due: the logits are made."""
    from torch.distributed.fsdp import fully_shard

    given = all_ranks(batch(4))
    model = patch(tiny(), fuse_head=True)
    rights = loss_and_gradients(tiny(), **given)
    fully_shard(model.lm_head)
    fully_shard(model)
    outputs = step(model, of_rank(here, given))
    assert type(outputs.logits) is torch.Tensor
    assert_close([w.grad.full_tensor() for w in model.parameters()], rights[1:])
    sharded = tiny()
    fully_shard(sharded.lm_head)
    with pytest.raises(TypeError, match="got FSDPLinear .*"):
        patch(sharded, fuse_head=True)


# --- compilers ---


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "method", "body", "layers"])
@pytest.mark.parametrize("return_stats", [True, False])
def test_compile(how, return_stats):
    torch._dynamo.reset()
    rights = loss_and_gradients(tiny(), **batch())
    model = patch(tiny(), fuse_head=True, return_stats=return_stats)
    compiled = model
    if how == "model":
        compiled = torch.compile(model, backend="aot_eager")
    elif how == "method":
        model.compile(backend="aot_eager")
    elif how == "body":
        model.model.compile(backend="aot_eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    for _ in range(2):
        assert_close(loss_and_gradients(compiled, **batch()), rights)
    outputs = compiled(**batch())
    assert is_pending(outputs) is (how in ("body", "layers"))
    if return_stats:
        assert model.loss_stats is not None and model.loss_stats.losses.shape == (3, 12)
        torch.testing.assert_close(
            model.loss_stats.losses.sum() / (batch()["labels"][:, 1:] >= 0).sum(), outputs.loss
        )


# --- Accelerate, Trainer ---


def test_accelerate_in_mixed_precision():
    accelerate = pytest.importorskip("accelerate")
    found = []
    for fuse_head, first in ((False, "patch"), (True, "patch"), (True, "prepare")):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        model = tiny()
        if first == "patch":
            model = accelerator.prepare(patch(model, fuse_head=fuse_head))
        else:
            model = patch(accelerator.prepare(model), fuse_head=fuse_head)
        outputs = model(**batch())
        assert outputs.logits.dtype == torch.float32 and is_pending(outputs) is fuse_head
        accelerator.backward(outputs.loss)
        found.append([outputs.loss.detach(), *(weight.grad for weight in model.parameters())])
        unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if first == "patch":
            assert is_pending(unwrapped(**batch())) is fuse_head
    assert_close(found[1], found[0], rounding=2e-2)
    assert_close(found[2], found[1])
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_learns_the_same(tmp_path):
    """With accumulation, evaluation of predictions, and the loss without logits at each step."""
    pytest.importorskip("accelerate")
    logs, weights, seen = [], [], []
    for fuse_head in (False, True):
        model = tiny()
        if fuse_head:
            patch(model, fuse_head=True)
            model.register_forward_hook(lambda m, args, output: seen.append(is_pending(output)))
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True,
                optim="sgd", save_strategy="no", seed=0, learning_rate=0.5, num_train_epochs=2,
                per_device_train_batch_size=2, gradient_accumulation_steps=3, logging_steps=1,
                max_grad_norm=0.0,
            ),
            train_dataset=dataset(10),
            eval_dataset=dataset(4),
            compute_metrics=lambda p: dict(right=(p.predictions.argmax(-1) == p.label_ids).mean()),
        )  # fmt: skip
        trainer.train()
        measured = trainer.evaluate()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                    + [measured["eval_loss"], measured["eval_right"]])  # fmt: skip
        weights.append([weight.detach() for weight in model.parameters()])
    assert len(seen) == 10 + 1 and all(seen)
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-4, atol=1e-6)
    assert_close(*weights[::-1], rounding=1e-4)


@pytest.mark.parametrize("first", ["hook", "patch"])
def test_a_head_with_a_hook_of_accelerate(first):
    """As a device map over several devices gives it one: its forward is replaced."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, rights = tiny(), loss_and_gradients(tiny(), **batch())
    if first == "hook":
        hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
        with pytest.warns(UserWarning, match="a forward of its own, .* are made"):
            patch(model, fuse_head=True)
    else:
        hooks.add_hook_to_module(patch(model, fuse_head=True).lm_head, hooks.ModelHook())
    assert_close(loss_and_gradients(model, **batch()), rights)
    assert is_pending(model(**batch())) is (first == "patch")
