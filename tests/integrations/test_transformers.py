"""transformers: one patched model computes the same loss by other means; all else stays."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from oracle import SEED
from torch import nn

import fused_ce

transformers = pytest.importorskip("transformers", reason='pip install "fused_ce[hf]"')

from models import VOCAB_SIZE, dataset, tiny, tokens  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss  # noqa: E402

from fused_ce.integrations import transformers as integration  # noqa: E402
from fused_ce.integrations.transformers import causal_lm_loss, patch, patched, unpatch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def llama(kind=None):
    return tiny("llama", kind)


def gemma2():
    return tiny("gemma2")


@pytest.fixture
def calls(monkeypatch):
    """The keywords of each call of our loss, in order."""
    seen = []

    def remember(*args, **kwargs):
        seen.append(kwargs)
        return fused_ce.fused_cross_entropy(*args, **kwargs)

    monkeypatch.setattr(integration, "fused_cross_entropy", remember)
    return seen


def loss_and_gradients(model, **batch):
    model.zero_grad()
    loss = model(input_ids=tokens(3, 12), **batch).loss
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]


def assert_equal(ours, theirs):
    """To what float32 leaves of a sum, relative to the largest element of each tensor."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * b.abs().max().item())


LABELS = tokens(3, 12, ignored=0.3, seed=1)
BATCHES = [
    pytest.param(dict(labels=LABELS), id="labels"),
    pytest.param(dict(labels=LABELS, shift_labels=tokens(3, 12, seed=2)), id="shift-labels"),
    pytest.param(dict(labels=LABELS, num_items_in_batch=57), id="items"),
    pytest.param(dict(labels=LABELS, num_items_in_batch=torch.tensor(57)), id="items-tensor"),
]


@pytest.mark.parametrize("new_model", [llama, gemma2])
@pytest.mark.parametrize("batch", BATCHES)
def test_loss_and_gradients_are_those_of_the_library(calls, new_model, batch):
    model = new_model()
    theirs = loss_and_gradients(model, **batch)
    assert not calls
    with patched(model):
        ours = loss_and_gradients(model, **batch)
    assert len(calls) == 1
    assert_equal(ours, theirs)
    assert_equal(loss_and_gradients(model, **batch), theirs)
    assert len(calls) == 1


def test_no_loss_without_labels(calls):
    assert patch(llama())(input_ids=tokens(3, 12)).loss is None and not calls


def random_logits(*shape, dtype=torch.float32):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(SEED + 3))).to(dtype)


# (logits, labels, further arguments)
CASES = [
    pytest.param((2, 5, 7), tokens(2, 5) % 7, {}, id="tokens"),
    pytest.param((2, 5, 7), None, dict(shift_labels=tokens(2, 5) % 7), id="no-labels"),
    pytest.param((2, 5, 7), tokens(2, 5) % 7, dict(cu_seq_lens_q=1, pad_token_id=0), id="further"),
    pytest.param((3, 3, 3), tokens(3, 3) % 3, {}, id="axes-of-one-length"),
    pytest.param((5, 7), tokens(5) % 7, {}, id="one-sequence"),
    pytest.param((2, 5, 7), None, dict(shift_labels=tokens(1, 10) % 7), id="flat-shift-labels"),
    pytest.param((2, 5, 14), None, dict(shift_labels=tokens(2, 5, 2) % 7), id="heads-in-one-axis"),
    pytest.param((2, 5, 7), tokens(2, 5) % 7, dict(ignore_index=3), id="ignore-index"),
    pytest.param((2, 5, 7), torch.full((2, 5), -100), {}, id="all-ignored"),
    pytest.param((2, 1, 7), tokens(2, 1) % 7, {}, id="one-token"),
    pytest.param((0, 5, 7), tokens(0, 5), {}, id="no-sequences"),
    pytest.param((2, 0, 7), tokens(2, 0), {}, id="no-tokens"),
    pytest.param((2, 5, 7), tokens(2, 5) % 7, dict(num_items_in_batch=3.5), id="items-of-a-share"),
    pytest.param((2, 5, 7), tokens(2, 5) % 7, dict(num_items_in_batch=0), id="0-items"),
    pytest.param(
        (2, 5, 7), torch.full((2, 5), -100), dict(num_items_in_batch=torch.tensor(0)),
        id="0-items-tensor",
    ),
    pytest.param(
        (2, 5, 7), torch.full((2, 5), -100), dict(num_items_in_batch=9), id="all-ignored-of-9",
    ),
]  # fmt: skip


@pytest.mark.parametrize("shape, labels, further", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_function_is_that_of_the_library(shape, labels, further, dtype):
    arguments = dict(labels=labels, vocab_size=7 if shape[-1] == 14 else shape[-1], **further)
    results = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        logits = random_logits(*shape, dtype=dtype).requires_grad_()
        loss = function(logits, **arguments)
        loss.backward(torch.tensor(0.37))
        results.append([loss.detach(), logits.grad])
    (loss, gradient), (their_loss, their_gradient) = results
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, their_loss, equal_nan=True)
    rounding = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(gradient, their_gradient, equal_nan=True, **rounding)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = random_logits(2, 5, 7), tokens(2, 5) % 7
    assert causal_lm_loss(logits, labels.to(dtype), 7) == causal_lm_loss(logits, labels, 7)


def test_items_of_data_parallel():
    """It scatters them as one row a replica; the library's loss then has two axes."""
    logits, labels = random_logits(2, 5, 7), tokens(2, 5) % 7
    ours = causal_lm_loss(logits, labels, 7, num_items_in_batch=torch.tensor([[3]]))
    theirs = ForCausalLMLoss(logits, labels, 7, num_items_in_batch=torch.tensor([[3]]))
    torch.testing.assert_close(ours, theirs.squeeze())


def test_vocab_size_may_be_left_to_the_logits():
    logits, labels = random_logits(2, 5, 7), tokens(2, 5) % 7
    assert causal_lm_loss(logits, labels, None) == causal_lm_loss(logits, labels, 7)


def test_float64_is_not_rounded():
    """The library rounds these logits to float32 first."""
    logits, labels = random_logits(2, 5, 7).double(), tokens(2, 5) % 7
    right = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(causal_lm_loss(logits, labels, 7), right, rtol=1e-14, atol=0)


def test_slices_of_logits():
    """Which the library cannot flatten."""
    padded, labels = random_logits(2, 6, 9), tokens(2, 5) % 7
    logits = padded[:, 1:, :7]
    torch.testing.assert_close(
        causal_lm_loss(logits, labels, 7), ForCausalLMLoss(logits.contiguous(), labels, 7)
    )


def test_labels_and_items_may_be_on_another_device(monkeypatch):
    """Items on the host are read there; items on the device stay a tensor, which nobody reads."""
    seen = []

    def remember(logits, targets, **kwargs):
        seen.append((targets, kwargs))

    monkeypatch.setattr(integration, "fused_cross_entropy", remember)
    logits, labels = torch.empty(2, 5, 7, device="meta"), tokens(2, 5) % 7
    items = [4, torch.tensor(4), torch.tensor([4.0]), torch.tensor(4, device="meta")]
    for n_items in items:
        causal_lm_loss(logits, labels, 7, num_items_in_batch=n_items)
    assert all(targets.device.type == "meta" for targets, _ in seen)
    *numbers, stays = [kwargs["normalizer"] for _, kwargs in seen]
    assert numbers == [4, 4, 4] and not any(isinstance(n, torch.Tensor) for n in numbers)
    assert stays.device.type == "meta"

    causal_lm_loss(torch.empty(2, 5, 7), labels, 7, num_items_in_batch=items[1])
    assert seen[-1][1]["normalizer"].data_ptr() == items[1].data_ptr()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_a_gpu_is_never_waited_for(device):
    model = llama().to(device)
    ids = tokens(3, 12).to(device)
    items = [None, 57, 0, torch.tensor(57), torch.tensor(57, device=device)]
    for n_items in [*items, *items]:  # the first round compiles
        logits = model(input_ids=ids).logits
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            causal_lm_loss(logits, ids, VOCAB_SIZE, num_items_in_batch=n_items).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_one_graph_for_every_length():
    def function(logits, labels, items):
        return causal_lm_loss(logits, labels, VOCAB_SIZE, num_items_in_batch=items)

    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for length in (12, 9, 7):
        labels = tokens(3, length, ignored=0.3, seed=1)
        results = []
        for run in (compiled, function):
            logits = random_logits(3, length, VOCAB_SIZE).requires_grad_()
            loss = run(logits, labels, torch.tensor(length))
            loss.backward()
            results.append([loss.detach(), logits.grad])
        assert_equal(*results)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1  # compiled for the first, used for the others


def large_allocations(function, n_bytes):
    """How often a call asks the CPU allocator for that much at once, on one thread."""
    from torch.profiler import ProfilerActivity, profile

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each has some scratch memory
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    finally:
        torch.set_num_threads(n_threads)
    events = profiler.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() >= n_bytes for event in events)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_buffer_of_the_size_of_the_logits_but_the_gradient(dtype):
    logits = random_logits(4, 256, 9000, dtype=dtype).requires_grad_()
    labels = torch.randint(9000, (4, 256))
    size = logits.nbytes * 9 // 10  # a slice of them is found too
    counts = [
        large_allocations(lambda f=function: f(logits, labels, 9000).backward(), size)
        for function in (causal_lm_loss, ForCausalLMLoss)
    ]
    assert counts[0] == 1 < counts[1]
    assert large_allocations(lambda: causal_lm_loss(logits.detach(), labels, 9000), size) == 0


def test_logits_stay_as_they_are():
    model = patch(llama())
    right = model(input_ids=tokens(3, 12)).logits
    out = model(input_ids=tokens(3, 12), labels=tokens(3, 12))
    out.loss.backward()
    assert torch.equal(out.logits, right)


# --- what patch does to a model ---


def own_loss(logits, labels, vocab_size, **kwargs):
    return logits.sum() * 0 + 42


def test_patching_twice_is_harmless(calls):
    model = llama()
    before = dict(vars(model))
    assert patch(patch(model)) is model and model.loss_function is causal_lm_loss
    assert unpatch(model) is model
    assert vars(model) == before and model.loss_function is ForCausalLMLoss
    assert unpatch(model) is model and vars(model) == before


def test_a_loss_of_the_users_own_comes_back():
    model = llama()
    model.loss_function = own_loss
    before = dict(vars(model))
    patch(patch(model))
    assert model.loss_function is causal_lm_loss
    unpatch(model)
    assert vars(model) == before and model.loss_function is own_loss


def test_ours_set_by_hand_comes_back():
    model = llama()
    model.loss_function = causal_lm_loss
    assert unpatch(unpatch(patch(model))).loss_function is causal_lm_loss


def test_a_loss_that_was_set_after_patching_stays():
    model = patch(llama())
    model.loss_function = own_loss
    assert unpatch(model).loss_function is own_loss
    assert unpatch(patch(model)).loss_function is own_loss


def test_a_module_that_was_assigned_in_vain_is_no_obstacle(calls):
    model = llama()
    model.loss_function = nn.CrossEntropyLoss()  # transformers does not see it
    names = set(model.state_dict())
    patch(model)(input_ids=tokens(3, 12), labels=LABELS)
    assert len(calls) == 1 and set(model.state_dict()) == names
    assert unpatch(model).loss_function is ForCausalLMLoss


def test_patched_leaves_what_it_found():
    model = llama()
    with patched(model) as same:
        assert same is model and model.loss_function is causal_lm_loss
        with patched(model):
            pass
        assert model.loss_function is causal_lm_loss
    assert model.loss_function is ForCausalLMLoss
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert model.loss_function is ForCausalLMLoss
    with patched(patch(model)):
        pass
    assert model.loss_function is causal_lm_loss


def test_no_other_model_is_patched():
    other, mapping = llama(), dict(LOSS_MAPPING)
    classes = {cls: dict(vars(cls)) for cls in type(other).__mro__ if cls is not object}
    with patched(llama()):
        assert other.loss_function is ForCausalLMLoss
        assert llama().loss_function is ForCausalLMLoss
        assert mapping == LOSS_MAPPING
        assert all(dict(vars(cls)) == before for cls, before in classes.items())


@pytest.mark.parametrize("duplicate", [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
])  # fmt: skip
def test_copies_are_patched_and_can_be_unpatched(calls, duplicate):
    model = llama()
    model.loss_function = own_loss
    again = duplicate(patch(model))
    assert again(input_ids=tokens(3, 12), labels=LABELS).loss != 42 and len(calls) == 1
    assert unpatch(again).loss_function is own_loss
    assert model.loss_function is causal_lm_loss


def test_saved_models_are_not_patched(tmp_path):
    model = llama()
    for folder in (tmp_path / "before", tmp_path / "after"):
        model.save_pretrained(folder)
        patch(model)
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "model.safetensors" in names
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        before, after = tmp_path / "before" / name, tmp_path / "after" / name
        assert before.read_bytes() == after.read_bytes(), name
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "after")
    assert loaded.loss_function is ForCausalLMLoss


def with_a_head_of_its_own(model):
    """As TRL does: the forward of the object is replaced, and computes the loss by itself."""
    forward = model.forward

    def other(input_ids, labels=None, fused_lm_head=False):
        if not fused_lm_head:
            return forward(input_ids=input_ids, labels=labels)
        logits = forward(input_ids=input_ids).logits
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels)

    model.forward = other
    return model


def test_a_loss_computed_elsewhere_is_said_once():
    """A patch without effect is a silent nothing otherwise."""
    model = with_a_head_of_its_own(patch(llama()))
    given = dict(input_ids=tokens(3, 12), labels=LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**given)
        model(input_ids=tokens(3, 12), fused_lm_head=False)
        with pytest.raises(TypeError):
            model(**given, nonsense=1)
    with pytest.warns(UserWarning, match="LlamaForCausalLM .* TRL .* no effect there"):
        model(**given, fused_lm_head=True)
    again = with_a_head_of_its_own(unpatch(patch(llama())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**given, fused_lm_head=True)
        again(**given, fused_lm_head=True)


def test_copies_say_it_too():
    model = copy.deepcopy(patch(llama()))
    with pytest.warns(UserWarning, match="no effect there"):
        with_a_head_of_its_own(model)(tokens(3, 12), labels=LABELS, fused_lm_head=True)


def test_a_patched_model_generates():
    model = patch(llama()).eval()
    assert model.generate(tokens(1, 4), max_new_tokens=2, min_new_tokens=2).shape == (1, 6)


def with_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )


class LikePeft(nn.Sequential):
    """What `patch` has to know of PEFT, where that is not installed."""

    def get_base_model(self):
        return self[0]

    def forward(self, **kwargs):
        return self[0](**kwargs)


@pytest.mark.parametrize("wrap", [
    pytest.param(with_peft, id="peft"),
    pytest.param(LikePeft, id="like-peft"),
    pytest.param(nn.DataParallel, id="data-parallel"),
    pytest.param(lambda model: torch.compile(model, backend="eager"), id="compile"),
    pytest.param(lambda model: nn.DataParallel(LikePeft(model)), id="two"),
])  # fmt: skip
def test_models_in_other_libraries_modules(calls, wrap):
    model = llama()
    wrapped = wrap(model)
    batch = dict(input_ids=tokens(3, 12), labels=LABELS)
    assert patch(wrapped) is wrapped and model.loss_function is causal_lm_loss
    if not hasattr(wrapped, "_orig_mod"):  # compiling takes seconds
        wrapped(**batch).loss.backward()
        assert len(calls) == 1
    assert unpatch(wrapped) is wrapped and model.loss_function is ForCausalLMLoss
    with patched(wrapped):
        assert model.loss_function is causal_lm_loss
    assert model.loss_function is ForCausalLMLoss


class BySuper(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class ByMethod(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return transformers.utils.ModelOutput(loss=self.loss_of(logits, labels))

    def loss_of(self, logits, labels):
        return self.loss_function(logits, labels, VOCAB_SIZE)


@pytest.mark.parametrize("kind", [BySuper, ByMethod])
def test_a_forward_may_leave_the_loss_to_others(calls, kind):
    patch(llama(kind))(input_ids=tokens(3, 12), labels=LABELS)
    assert len(calls) == 1


class ItsOwnForward(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class ItsOwnLossFunction(transformers.LlamaForCausalLM):
    def loss_function(self, logits, labels, vocab_size, **kwargs):
        return logits.sum()


REFUSED = [
    pytest.param(lambda: nn.Linear(2, 2), "causal language model .* got Linear", id="module"),
    pytest.param(lambda: "gpt2", "causal language model .* got str", id="name"),
    pytest.param(lambda: transformers.LlamaForCausalLM, "got type", id="class"),
    pytest.param(
        lambda: nn.DataParallel(nn.Linear(2, 2)), "got DataParallel", id="module-inside"
    ),
    pytest.param(
        lambda: llama(transformers.LlamaModel), "self.loss_function, got LlamaModel", id="no-head"
    ),
    pytest.param(
        lambda: llama(transformers.LlamaForSequenceClassification),
        "ForCausalLMLoss, got LlamaForSequenceClassification, .* ForSequenceClassificationLoss",
        id="classifier",
    ),
    pytest.param(lambda: llama(ItsOwnForward), "got ItsOwnForward, .* elsewhere", id="forward"),
    pytest.param(lambda: llama(ItsOwnLossFunction), "got ItsOwnLossFunction", id="loss-function"),
]  # fmt: skip


@pytest.mark.parametrize("new, message", REFUSED)
def test_refuses_what_has_no_such_loss(new, message):
    model = new()
    before = set(getattr(model, "__dict__", ()))
    with pytest.raises(TypeError, match=message):
        patch(model)
    with pytest.raises(TypeError, match=message), patched(model):
        pytest.fail("entered")
    assert set(getattr(model, "__dict__", ())) == before


def test_unpatch_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="got Linear"):
        unpatch(nn.Linear(2, 2))


@pytest.mark.parametrize("arguments, message", [
    (dict(labels=None, vocab_size=7), "labels or shift_labels, got None for both"),
    (dict(labels=tokens(2, 5), vocab_size=6), r"\(2, 5\) with vocab_size=6 .* got \(2, 5, 7\)"),
    (dict(labels=tokens(2, 4), vocab_size=7), r"labels \(2, 4\) .* got \(2, 5, 7\)"),
    (
        dict(labels=tokens(2, 5), vocab_size=7, num_items_in_batch=torch.ones(2)),
        r"one element, got \(2,\)",
    ),
])  # fmt: skip
def test_errors_say_what_is_needed_and_what_came(arguments, message):
    with pytest.raises(ValueError, match=message):
        causal_lm_loss(random_logits(2, 5, 7), **arguments)


# --- the Trainer ---


def arguments_of_trainer(folder, **further):
    return transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, optim="sgd",
        save_strategy="no", seed=0, **further,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_with_gradient_accumulation_makes_the_same_weights(calls, tmp_path):
    arguments = arguments_of_trainer(
        tmp_path, learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2,
        logging_steps=1, eval_strategy="epoch",
    )  # fmt: skip
    models, logs, n_calls = [llama(), patch(llama())], [], []
    start = [weight.detach().clone() for weight in models[0].parameters()]
    for model in models:
        trainer = transformers.Trainer(
            model, arguments, train_dataset=dataset(10), eval_dataset=dataset(3)
        )
        trainer.train()
        logs.append([
            entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss")
            if name in entry
        ])  # fmt: skip
        n_calls.append(len(calls))
    assert n_calls == [0, 2 * (5 + 1)]  # two epochs of five micro-batches and one to evaluate
    assert isinstance(calls[0]["normalizer"], torch.Tensor)  # the labels of three micro-batches
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-4, atol=0)
    weights = [list(model.parameters()) for model in models]
    moved = [(a - b).abs().max() for a, b in zip(start, weights[0], strict=True)]
    for theirs, ours, distance in zip(*weights, moved, strict=True):
        assert distance > 1e-4
        assert (ours - theirs).abs().max() < 1e-4 * distance
