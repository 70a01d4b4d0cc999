"""Runs: what they leave, and that they can be stopped and continued anywhere."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ce.babygpt import data as batches
from fused_ce.babygpt.checkpoint import load_checkpoint, load_model, newest_checkpoint
from fused_ce.babygpt.config import PRESETS
from fused_ce.babygpt.data import load_dataset
from fused_ce.babygpt.device import resolve_device
from fused_ce.babygpt.distributed import World
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.model import BabyGPT
from fused_ce.babygpt.record import TensorBoard
from fused_ce.babygpt.run import Run
from fused_ce.babygpt.sample import stream
from fused_ce.babygpt.train import train


def weights(folder):
    return (folder / "weights.safetensors").read_bytes()


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [(row["step"], row["train"], row["val"], row["lr"]) for row in rows(folder)]


def test_a_run_leaves_its_files(config, folder):
    names = {path.name for path in config.out.iterdir()}
    assert names == {"last.pt", "best.pt", "log.jsonl", "loss.png", "weights.safetensors"}
    for row in rows(config.out):
        assert set(row) == {"step", "train", "val", "lr", "tokens_per_s", "peak_memory_bytes"}
    assert [row["step"] for row in rows(config.out)] == [0, 10, 20]
    assert rows(config.out)[1]["tokens_per_s"] > 0
    assert rows(config.out)[1]["peak_memory_bytes"] > 2**20


def test_every_step_is_logged_on_request(config):
    train(replace(config, log_steps=True, max_steps=13))
    train(replace(config, log_steps=True), newest_checkpoint(config.out)[0])
    steps = [json.loads(line) for line in (config.out / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert all(row["loss"] > 0 and row["seconds"] > 0 for row in steps)
    logged = config.out
    train(replace(config, log_steps=False, max_steps=1, overwrite=True))
    assert not (logged / "steps.jsonl").exists()  # it belonged to the run that was replaced


def shown(folder):
    """The validation losses that TensorBoard finds."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss/val")]


def test_tensorboard_shows_the_log(config):
    pytest.importorskip("tensorboard")
    train(replace(config, tensorboard=True, max_steps=10))
    train(replace(config, tensorboard=True), newest_checkpoint(config.out)[0])
    log = [(row["step"], row["val"]) for row in rows(config.out)]
    assert [step for step, _ in log] == [0, 10, 20] and log == shown(config.out / "tensorboard")


def test_tensorboard_forgets_what_was_after_the_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path)
    for step in (0, 10, 20):
        board.append({"step": step, "val": step / 10})
    TensorBoard(tmp_path, until_step=10).append({"step": 15, "val": 1.5})
    assert shown(tmp_path) == [(0, 0.0), (10, 1.0), (15, 1.5)]
    TensorBoard(tmp_path).append({"step": 0, "val": 7.0})
    assert shown(tmp_path) == [(0, 7.0)]


def test_tensorboard_is_imported_only_when_asked_for(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(replace(config, max_steps=1))
    with pytest.raises(UserError, match="needs TensorBoard"):
        train(replace(config, tensorboard=True, max_steps=2))
    assert rows(config.out)[-1]["step"] == 1  # refused before the run was replaced


def test_the_loss_falls(config):
    train(replace(config, max_steps=100, dropout=0.0, decay_steps=100))
    first, *_, last = rows(config.out)
    assert last["train"] < first["train"] - 0.5 and last["val"] < first["val"] - 0.5


def test_the_last_step_is_evaluated_when_no_interval_ends_there(config):
    train(replace(config, max_steps=13))
    assert [row["step"] for row in rows(config.out)] == [0, 10, 13]


def test_the_log_has_the_rate_of_the_next_step(config):
    train(replace(config, eval_interval=5))
    assert [row["lr"] for row in rows(config.out)] == pytest.approx([0, 1e-2, 5.5e-3, 1e-3, 1e-3])


def test_best_is_the_checkpoint_with_the_lowest_val(config):
    # A rate that is far too large: the last evaluation is not the best.
    train(replace(config, lr=1.0, min_lr=1.0, max_steps=30))
    best = min(rows(config.out), key=lambda row: row["val"])
    assert load_checkpoint(config.out / "best.pt")["step"] == best["step"]
    assert load_checkpoint(config.out / "last.pt")["step"] == 30 != best["step"]


def test_training_draws_through_get_batch(config, monkeypatch):
    drawn = []
    get_batch = batches.get_batch

    def observed(data, batch_size, block_size, **kwargs):
        drawn.append((len(data), batch_size, block_size))
        return get_batch(data, batch_size, block_size, **kwargs)

    monkeypatch.setattr(batches, "get_batch", observed)
    train(replace(config, max_steps=5, eval_iters=1))
    assert drawn == [(3600, 4, 16), (400, 4, 16)] + [(3600, 4, 16)] * 6 + [(400, 4, 16)]


def test_evaluation_does_not_change_the_run(config, folder):
    often = replace(config, eval_interval=1, eval_iters=7, out=config.out.parent / "often")
    train(often)
    assert weights(often.out) == weights(config.out)


def test_the_seed_decides_the_run(config, folder):
    same, other = config.out.parent / "same", config.out.parent / "other"
    train(replace(config, out=same))
    train(replace(config, out=other, seed=2))
    assert weights(same) == weights(config.out) != weights(other)


def test_all_losses_give_the_same_curve(config):
    """Of 320 tokens a step, which the linear loss takes in two chunks."""
    config = replace(config, max_steps=200, dropout=0.0, lr=1e-3, warmup_steps=10, decay_steps=200)
    dataset = load_dataset(config.data)
    curves = {}
    for loss in ("fused", "linear", "torch"):
        run = Run(replace(config, loss=loss, batch_size=20), dataset, World())
        curves[loss] = torch.stack([run.advance() for _ in range(200)])
    for loss in ("linear", "torch"):
        torch.testing.assert_close(curves[loss], curves["fused"], rtol=0, atol=1e-4)
    assert curves["fused"][-1] < curves["fused"][0] - 0.3


def test_training_by_the_linear_loss_makes_no_whole_logits(config, monkeypatch):
    forward, calls = torch.nn.Linear.forward, []

    def observed(module, hidden):
        if module.out_features == 28 and len(hidden) > 1:  # a sample is one text
            calls.append(hidden.shape)
        return forward(module, hidden)

    monkeypatch.setattr(torch.nn.Linear, "forward", observed)
    for loss in ("fused", "linear"):
        assert not calls
        train(replace(config, loss=loss, max_steps=2, overwrite=True))
        assert bool(calls) == (loss == "fused")
        calls.clear()


def test_an_old_run_survives_a_new_one_that_cannot_begin(config, folder):
    before = weights(config.out)
    with pytest.raises(UserError, match="--block-size 400 needs at least 401 characters"):
        train(replace(config, block_size=400, overwrite=True))
    assert weights(config.out) == before


def test_a_gradient_that_is_not_finite_stops_the_run(config, monkeypatch):
    advance = Run.advance

    def poison(run):
        if run.step == 8:
            with torch.no_grad():
                run.model.head.weight[0] = torch.inf
        return advance(run)

    monkeypatch.setattr(Run, "advance", poison)
    with pytest.raises(UserError, match="before step 9: the gradient is not finite"):
        train(config)
    assert load_checkpoint(config.out / "last.pt")["step"] == 7


def test_clip_bounds_the_norm_of_the_gradient(config):
    run = Run(replace(config, clip=1e-3), load_dataset(config.data), World())
    run.advance()
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_curve_is_a_picture(config, folder):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    pixels = matplotlib_image.imread(config.out / "loss.png")
    assert min(pixels.shape[:2]) > 300
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2])}) > 2


def test_the_weights_are_those_of_the_last_step(config, folder):
    from safetensors.torch import load_file

    saved = load_checkpoint(config.out / "last.pt")["model"]
    loaded = load_file(config.out / "weights.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_device_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda needs a GPU"):
        resolve_device("cuda")


def test_autocast_rounds_the_linear_loss_as_the_fused_one(config):
    def first_loss(loss, dtype):
        run = Run(replace(config, loss=loss, dtype=dtype, dropout=0.0), dataset, World())
        torch.nn.init.normal_(run.model.head.weight)  # so that the roundings show
        return run.advance().item()

    dataset = load_dataset(config.data)
    exact, rounded = first_loss("fused", "float32"), first_loss("fused", "bfloat16")
    assert first_loss("linear", "bfloat16") == pytest.approx(rounded, rel=1e-6)
    assert exact != pytest.approx(rounded, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_logits_and_weights_are_float32(config, dtype):
    run = Run(replace(config, dtype=dtype), load_dataset(config.data), World())
    seen = []
    run.model.head.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    run.advance()
    assert seen == [getattr(torch, dtype)]
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


@pytest.mark.parametrize("loss", ["fused", "linear"])
def test_a_float16_step_that_overflows_is_left_out(config, loss):
    config = replace(config, dtype="float16", warmup_steps=0, loss=loss)
    run = Run(config, load_dataset(config.data), World())
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**40})
    before = run.model.head.weight.detach().clone()
    run.advance()
    assert run.scaler.get_scale() == 2.0**39 and torch.equal(run.model.head.weight, before)
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**10})
    run.advance()
    assert not torch.equal(run.model.head.weight, before)
    again = Run(run.config, run.dataset, World())
    again.restore(run.state())
    assert again.scaler.state_dict() == run.scaler.state_dict()


def test_a_float16_run_whose_scale_is_used_up_stops(config):
    run = Run(replace(config, dtype="float16"), load_dataset(config.data), World())
    with torch.no_grad():
        run.model.head.weight[0] = torch.inf
    with pytest.raises(UserError, match="before step 17: the gradient is not finite"):
        for _ in range(20):
            run.advance()


def test_inplace_gives_the_same_run(config, folder):
    """To rounding: small logits that stay are PyTorch's own operations on a CPU."""
    inplace = replace(config, inplace=True, out=config.out.parent / "inplace")
    train(inplace)
    for ours, others in zip(losses(inplace.out), losses(config.out), strict=True):
        assert ours == pytest.approx(others, rel=1e-5)
    run = Run(inplace, load_dataset(config.data), World())
    x, y = run._draw()
    logits, _ = run.model(x, y)
    assert logits.sum(-1).abs().max() < 1e-6  # a gradient's rows sum to 0, the logits' do not


@pytest.mark.parametrize("loss", ["fused", "linear"])
def test_a_compiled_run_follows_the_same_curve(config, monkeypatch, loss):
    backends = []

    def compile_cheaply(module):  # inductor would take half a minute
        backends.append("aot_eager")
        module._compiled_call_impl = torch.compile(
            module._call_impl, backend="aot_eager", fullgraph=True
        )

    monkeypatch.setattr(torch.nn.Module, "compile", compile_cheaply)
    config = replace(config, dropout=0.0, loss=loss)
    curves = []
    for flag in (False, True):
        run = Run(replace(config, compile=flag), load_dataset(config.data), World())
        curves.append(torch.stack([run.advance() for _ in range(10)]))
    assert backends == ["aot_eager"]
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-5)


def test_numerical_switches_hold_during_the_run_alone(config, monkeypatch):
    seen = []
    advance = Run.advance

    def observe(run):
        seen.append(
            (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
        )
        return advance(run)

    monkeypatch.setattr(Run, "advance", observe)
    train(replace(config, max_steps=1))
    train(replace(config, max_steps=1, deterministic=True, tf32=True, overwrite=True))
    assert seen == [(False, "highest"), (True, "high")]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


def test_micro_batches_do_not_make_the_host_wait(config):
    class CountReads(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += func in (torch.ops.aten._local_scalar_dense.default,)
            return func(*args, **(kwargs or {}))

    reads = []
    for grad_accum in (1, 5):  # torch's loss: the CPU path of ours reads the targets
        accumulating = replace(config, grad_accum=grad_accum, loss="torch")
        run = Run(accumulating, load_dataset(config.data), World())
        with CountReads() as count:
            run.advance()
        reads.append(count.n)
    assert reads[0] == reads[1] <= 2


def test_gpt2_has_the_tokens_and_parameters_of_gpt2():
    assert PRESETS["gpt2"].tokenizer == "bpe" and PRESETS["gpt2"].bpe_vocab_size == 50_257
    with torch.device("meta"):
        model = BabyGPT(PRESETS["gpt2"].model(vocab_size=65))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.head.out_features == 50_257


def test_a_padded_vocabulary_trains_and_is_never_drawn(config, capsys):
    train(replace(config, min_vocab_size=5000, max_steps=2))
    model, tokenizer, _ = load_model(config.out)
    assert model.head.out_features == 5000 and tokenizer.vocab_size == 28
    stream(model, tokenizer, "", 50, temperature=100.0, seed=0)


def test_a_lack_of_memory_is_explained(config, monkeypatch):
    def fail(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Run, "advance", fail)
    with pytest.raises(UserError, match="too little memory for --batch-size 4"):
        train(config)


@pytest.mark.slow
def test_the_quick_preset_reaches_1_75_on_pydocs(tmp_path):
    """Half of the preset's steps are enough; the schedule is that of all of them."""
    quick = PRESETS["quick"]
    assert quick.decay_steps == quick.max_steps == 1500
    train(replace(quick, max_steps=750, eval_interval=750, out=tmp_path / "quick"))
    assert rows(tmp_path / "quick")[-1]["val"] < 1.75
