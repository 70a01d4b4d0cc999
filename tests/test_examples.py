"""examples/ and README's loops: they run, learn, and no token counts more than another."""

import copy
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_ce import fused_cross_entropy

ROOT = Path(__file__).resolve().parents[1]
LOOPS = {"plain_loop": None, "accelerate_loop": "accelerate", "lightning_module": "lightning"}


@pytest.fixture(autouse=True)
def quiet_and_on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def load(name, run_name="example"):
    needed = {**LOOPS, "transformers_trainer": "transformers"}[name]
    if needed is not None:
        pytest.importorskip(needed)
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name=run_name)


def test_every_example_is_here():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {*LOOPS, "transformers_trainer", "vocab_parallel_fsdp"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*LOOPS, "transformers_trainer"])
def test_examples_run_and_learn(capsys, name):
    load(name, run_name="__main__")
    (last,) = re.findall(r"^\d+ steps: loss ([\d.]+) -> ([\d.]+)$", capsys.readouterr().out, re.M)
    first, final = map(float, last)
    assert 4 < first < 4.5 and final < 0.25


@pytest.mark.slow
def test_a_mesh_of_data_and_vocabulary_learns_as_one_process():
    """FSDP2 along one axis, the head's rows along the other."""
    said = []
    for n_processes in (1, 4):
        result = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", str(n_processes), "examples/vocab_parallel_fsdp.py",
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        said.append(re.findall(r"^step (\d+): loss ([\d.]+)$", result.stdout, re.MULTILINE))
        assert len(said[-1]) == 2, result.stderr
    (_, first), (_, last) = said[0]
    assert 4 < float(first) < 5 and float(last) < 0.1
    for one, four in zip(*said, strict=True):
        assert float(one[1]) == pytest.approx(float(four[1]), abs=5e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOPS)
def test_micro_batches_move_the_weights_as_one_batch_of_them_all(name):
    """The last step has fewer micro-batches, by which neither library divides."""
    example = load(name)
    dataset = example["data"](8 * 10)
    model = example["new_model"]()
    start, whole = copy.deepcopy(model), copy.deepcopy(model)
    losses = example["train"](model, dataset, accumulate=4)

    optimizer = torch.optim.SGD(whole.parameters(), lr=4.0)
    right = []
    for inputs, targets in torch.utils.data.DataLoader(dataset, batch_size=8 * 4):
        loss = F.cross_entropy(whole(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right.append(loss.item())
    torch.testing.assert_close(losses, right, rtol=1e-5, atol=0)
    assert len(right) == 3
    for ours, theirs, before in zip(
        model.parameters(), whole.parameters(), start.parameters(), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-5 * (theirs - before).abs().max()


def block_of_the_readme(library):
    readme = (ROOT / "README.md").read_text("utf-8")
    section = readme.partition("\n## transformers")[2].partition("\n## ")[0]
    (block,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        if f"import {library}" in block or f"from {library}" in block
    ]
    return block


def micro_batches_and_their_gradient(model):
    """Three of unequal length, and the gradient of the mean over the tokens of all."""
    inputs = [torch.randint(7, (2, n)) for n in (3, 9, 4)]
    targets = [torch.randint(7, tensor.shape) for tensor in inputs]
    targets[1][:, 2:5] = -100
    logits = model(torch.cat(inputs, dim=1)).flatten(0, 1)
    F.cross_entropy(logits, torch.cat(targets, dim=1).flatten()).backward()
    right, model.weight.grad = model.weight.grad, None
    return list(zip(inputs, targets, strict=True)), right


@pytest.mark.filterwarnings("ignore")
def test_accelerate_in_the_readme():
    pytest.importorskip("accelerate")
    model = torch.nn.Embedding(7, 7)
    micro_batches, right = micro_batches_and_their_gradient(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    names = dict(
        fused_cross_entropy=fused_cross_entropy, model=model, optimizer=optimizer,
        micro_batches=micro_batches,
    )  # fmt: skip
    exec(block_of_the_readme("accelerate"), names)
    torch.testing.assert_close(model.weight.grad, right)


@pytest.mark.filterwarnings("ignore")
def test_lightning_in_the_readme():
    lightning = pytest.importorskip("lightning")
    names = dict(fused_cross_entropy=fused_cross_entropy)
    exec(block_of_the_readme("lightning"), names)

    class Model(names["Model"]):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def on_before_optimizer_step(self, optimizer):
            self.gradient = self.model.weight.grad.clone()

    model = Model(torch.nn.Embedding(7, 7))
    micro_batches, right = micro_batches_and_their_gradient(model.model)
    n_tokens = sum((targets != -100).sum() for _, targets in micro_batches)
    batches = [(inputs, targets, n_tokens) for inputs, targets in micro_batches]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    torch.testing.assert_close(model.gradient, right)
