"""TRL's trainers: what a patched one logs and learns is what TRL's own head makes, to rounding."""

import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='pip install "fused_ce[hf]"')
trl = pytest.importorskip("trl", reason='pip install "fused_ce[trl]"')

import datasets  # noqa: E402
from packaging.version import Version  # noqa: E402
from small_models import gemma2, llama, text, tokenizer, tokens  # noqa: E402

from fused_ce.integrations import transformers as losses  # noqa: E402
from fused_ce.integrations import trl as integration  # noqa: E402
from fused_ce.integrations.trl import patch, patched, unpatch  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
# What a log says of time, and signs of differences that are 0 where nothing has been learnt yet.
NOT_COMPARED = ("runtime", "per_second", "step_time", "rewards/accuracies")


@pytest.fixture(autouse=True)
def each_by_itself(monkeypatch):
    """Quietly; and what a trainer in 16 bits leaves in the environment is not for the next one."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    datasets.disable_progress_bars()


@pytest.fixture
def calls(monkeypatch):
    """The targets of each call of our operator, in order."""
    seen, function = [], integration.fused_linear_cross_entropy

    def remember(hidden, weight, targets, **kwargs):
        seen.append(targets)
        return function(hidden, weight, targets, **kwargs)

    monkeypatch.setattr(integration, "fused_linear_cross_entropy", remember)
    return seen


def saved(model, folder):
    """As loaded: reference models are loaded from where the policy was."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def rows(**columns):
    """20 samples; a column is (its fewest words, how many lengths, its number)."""
    return datasets.Dataset.from_list([
        {
            name: text(least + i % lengths, seed=100 * number + i)
            for name, (least, lengths, number) in columns.items()
        }
        for i in range(20)
    ])  # fmt: skip


PROMPT, COMPLETION, REJECTED = (3, 4, 0), (2, 5, 1), (3, 3, 2)


def options(folder, kind, **further):
    """Of a trainer in float32, where nothing is asked of `further`."""
    plain = dict(
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_steps=1, max_steps=3, per_device_train_batch_size=2, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    return getattr(trl, f"{kind}Config")(str(folder / "out"), **{**plain, **further})


def sft(folder, model=llama, peft_config=None, **further):
    return trl.SFTTrainer(
        saved(model(), folder), options(folder, "SFT", **further), processing_class=tokenizer(),
        train_dataset=rows(prompt=PROMPT, completion=COMPLETION), peft_config=peft_config,
        eval_dataset=rows(prompt=REJECTED, completion=COMPLETION),
    )  # fmt: skip


def dpo(folder, model=llama, peft_config=None, **further):
    return trl.DPOTrainer(
        saved(model(), folder), args=options(folder, "DPO", **further),
        train_dataset=rows(prompt=PROMPT, chosen=COMPLETION, rejected=REJECTED),
        processing_class=tokenizer(), peft_config=peft_config,
    )  # fmt: skip


def kto(folder, **further):
    samples = rows(prompt=PROMPT, completion=COMPLETION)
    return trl.KTOTrainer(
        saved(llama(), folder), args=options(folder, "KTO", **further),
        train_dataset=samples.add_column("label", [i % 2 == 0 for i in range(20)]),
        processing_class=tokenizer(),
    )  # fmt: skip


def length_of(completions, **kwargs):
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def grpo(folder, kind="GRPO", model=llama, **further):
    further = {"max_completion_length": 5, "num_generations": 2, "beta": 0.1, **further}
    return getattr(trl, f"{kind}Trainer")(
        saved(model(), folder), reward_funcs=length_of, args=options(folder, kind, **further),
        train_dataset=rows(prompt=PROMPT), processing_class=tokenizer(),
    )  # fmt: skip


def rloo(folder, **further):
    return grpo(folder, "RLOO", **further)


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


def trained(trainer):
    """(what it logged, weights that moved and how far) of a run."""
    start = [weight.detach().clone() for weight in trainer.model.parameters()]
    torch.manual_seed(0)
    trainer.train()
    logged = [
        {
            name: value
            for name, value in entry.items()
            if not any(word in name for word in NOT_COMPARED)
        }
        for entry in trainer.state.log_history
    ]
    weights = [weight.detach() for weight in trainer.model.parameters()]
    return logged, weights, [(a - b).norm() for a, b in zip(start, weights, strict=True)]


def assert_learns_the_same(calls, make, folder, rounding=1e-4, **further):
    logged, weights, moved = trained(make(folder, **further))
    assert not calls
    our_log, ours, _ = trained(patch(make(folder, **further)))
    assert calls and len(our_log) == len(logged) and sum(moved) > 0
    for ours_at, theirs_at in zip(our_log, logged, strict=True):
        assert ours_at.keys() == theirs_at.keys()
        for name, value in theirs_at.items():
            close = pytest.approx(value, rel=rounding, abs=2 * rounding)  # some are cut to 1e-4
            assert ours_at[name] == close, name
    for a, b, distance in zip(ours, weights, moved, strict=True):
        assert (a - b).norm() <= 10 * rounding * distance + 1e-7


# (trainer, options)
TRAINERS = [
    pytest.param(sft, {}, id="sft"),
    pytest.param(sft, dict(packing=True, max_length=16), id="sft-packing", marks=pytest.mark.slow),
    pytest.param(
        sft, dict(completion_only_loss=False), id="sft-prompts-too", marks=pytest.mark.slow
    ),
    pytest.param(sft, dict(loss_type="dft"), id="sft-dft", marks=pytest.mark.slow),
    pytest.param(sft, dict(model=gemma2), id="sft-cap", marks=pytest.mark.slow),
    pytest.param(
        sft, dict(gradient_accumulation_steps=3), id="sft-accumulation", marks=pytest.mark.slow
    ),
    pytest.param(dpo, {}, id="dpo"),
    pytest.param(dpo, dict(use_weighting=True), id="dpo-weighting", marks=pytest.mark.slow),
    pytest.param(dpo, dict(model=gemma2), id="dpo-cap", marks=pytest.mark.slow),
    pytest.param(
        dpo, dict(precompute_ref_log_probs=True), id="dpo-precomputed", marks=pytest.mark.slow
    ),
    pytest.param(kto, {}, id="kto"),
    pytest.param(grpo, {}, id="grpo"),
    pytest.param(
        grpo,
        dict(temperature=0.7, top_entropy_quantile=0.5),
        id="grpo-entropy",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        grpo, dict(cast_lm_head_to_fp32=True), id="grpo-float32-head", marks=pytest.mark.slow
    ),
    pytest.param(rloo, {}, id="rloo"),
]


@pytest.mark.parametrize("make, further", TRAINERS)
def test_a_patched_trainer_learns_the_same(calls, tmp_path, make, further):
    assert_learns_the_same(calls, make, tmp_path, **further)


@pytest.mark.parametrize("make", [sft, pytest.param(dpo, marks=pytest.mark.slow)])
def test_with_adapters(calls, tmp_path, make):
    assert_learns_the_same(calls, make, tmp_path, peft_config=lora(), learning_rate=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_in_16_bits(calls, tmp_path, make):
    """Under autocast, as TRL's trainers are by default."""
    if Version(trl.__version__) < Version("1.16"):
        pytest.skip("its kernels, interpreted, cut 16 bits where others round")
    assert_learns_the_same(calls, make, tmp_path, rounding=2**-7, bf16=True)


@pytest.mark.slow
@pytest.mark.parametrize("make, further", [
    pytest.param(sft, {}, id="sft"),
    pytest.param(sft, dict(packing=True, max_length=16), id="sft-packing"),
    pytest.param(dpo, {}, id="dpo"),
])  # fmt: skip
def test_twenty_steps(calls, tmp_path, make, further):
    assert_learns_the_same(
        calls, make, tmp_path, max_steps=20, gradient_accumulation_steps=2, **further
    )


def test_of_prompts_and_padding_nothing_is_scored(calls, tmp_path):
    trainer = patch(sft(tmp_path, max_steps=1))
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(inputs))
    counts = inputs["labels"][:, 1:] != -100
    assert [len(targets) for targets in calls] == [counts.sum()]
    assert counts.sum() < inputs["attention_mask"].sum() < counts.numel() + 2


def test_evaluation(calls, tmp_path):
    trainer = sft(tmp_path)
    theirs = trainer.evaluate()
    with patched(trainer):
        ours = trainer.evaluate()
    assert calls
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


# --- log-probabilities as trainers ask for them ---


def test_log_probabilities_of_policy_and_reference(calls, tmp_path):
    trainer = grpo(tmp_path, temperature=0.6)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(2)  # not those of the reference
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0

    def scores():
        return [
            trainer._get_per_token_logps_and_entropies(
                model, ids, mask, logits_to_keep=6, batch_size=2, compute_entropy=entropy
            )[:2]
            for model, entropy in ((trainer.model, True), (trainer.ref_model, False))
        ]

    (logps, entropies), (ref_logps, _) = scores()
    assert not calls and (logps - ref_logps).abs().max() > 0.1
    patch(trainer)
    (our_logps, our_entropies), (our_ref_logps, _) = scores()
    assert len(calls) == 2 * 2
    torch.testing.assert_close(our_logps, logps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_entropies, entropies, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_ref_logps, ref_logps, rtol=1e-5, atol=1e-6)
    (our_logps.sum() + our_entropies.sum()).backward()
    assert trainer.model.lm_head.weight.grad.abs().max() > 0


def test_log_probabilities_of_pairs(calls, tmp_path):
    trainer = dpo(tmp_path)
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    assert not calls
    ours = patch(trainer).compute_ref_log_probs(trainer.ref_model, inputs)
    assert len(calls) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- beside the patch of transformers ---


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_the_loss_of_a_model_has_no_effect_and_says_so(tmp_path, adapters):
    """Unless the trainer is patched: then the loss is ours, whoever asked for it."""
    if adapters and Version(pytest.importorskip("peft").__version__) < Version("0.21"):
        pytest.skip("this PEFT calls forward itself, which no hook of the model sees")
    trainer = sft(tmp_path, max_steps=1, peft_config=lora() if adapters else None)
    losses.patch(trainer.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no effect there")
        with patched(trainer):
            trainer.train()
    with pytest.warns(UserWarning, match=r"no effect there.*integrations\.trl\.patch"):
        trainer.train()


def test_refuses_a_trainer_of_transformers(tmp_path):
    trainer = transformers.Trainer(llama(), transformers.TrainingArguments(str(tmp_path)))
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match="got Trainer with trl .* LlamaForCausalLM has none"):
            function(trainer)
