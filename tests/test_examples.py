"""examples/: they run, learn, and no token counts more than another."""

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
