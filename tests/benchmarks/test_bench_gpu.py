"""The command: what it lists, what it leaves out, what it writes; and its parts on the CPU."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cpu as cpu_suite
from benchmarks import cuda_tests, gpu, launch_cost, records, training
from benchmarks.cases import GPU_CASES
from benchmarks.providers import COMPILED, EAGER, OURS, PROVIDERS
from benchmarks.session import FILES, Part, run_parts
from fused_ce.babygpt.model import torch_loss

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Thing:
    label: str


def test_dry_run_lists_every_part_case_and_provider(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}: " in text for name in gpu.PARTS)
    assert all(f"  {case.label}: " in text for case in GPU_CASES)
    assert all(name in text for name in PROVIDERS)
    assert "missing: liger, liger_kernel is not installed" in text
    assert "train gpt2, V = 50,257, bfloat16" in text


def test_dry_run_of_some_parts(capsys):
    gpu.main(["--dry-run", "--only", "launch,ceilings"])
    lines = capsys.readouterr().out.splitlines()
    parts = [line.split(":")[0] for line in lines if "of 9 minutes" in line]
    assert parts == ["ceilings", "launch"]


def test_unknown_parts_and_absent_gpus_are_refused(monkeypatch):
    with pytest.raises(SystemExit, match="--only takes"):
        gpu.main(["--only", "nothing"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main([])


def test_default_parts_fit_the_time():
    default = [part for part in gpu.PARTS.values() if not part.on_request]
    assert sum(part.minutes for part in default) <= 9
    assert list(gpu.PARTS)[:3] == ["ceilings", "headline", "tests"]


@pytest.mark.slow
def test_suite_runs_on_the_cpu(uncompiled, monkeypatch, tmp_path):
    losses = {name: make for name, make in training.LOSSES.items() if name != COMPILED}
    monkeypatch.setattr(training, "LOSSES", losses)
    monkeypatch.setattr(launch_cost, "CALLS", 3)
    out = tmp_path / "out"
    parts = "ceilings,headline,linear,training,launch,kernels"
    assert gpu.main(["--device", "cpu", "--quick", "--only", parts, "--out", str(out)]) == 0
    found = records.read(out / "results.json")
    kinds = {record.case.split()[0] for record in found if record.ms_median}
    assert kinds == {
        "clone", "read", "matmul", "train", "launch", "forward", "forward_backward",
        "separate_backward", "in_place", "linear",
    }  # fmt: skip
    assert {"liger", "quack"} <= {r.provider for r in found if r.case == "all"}
    assert all(r.ms_median or r.case == "all" for r in found), [r for r in found if r.note]
    log = (out / "log.txt").read_text()
    assert "left out: nothing" in log and "== kernels" in log
    assert {path.name for path in out.iterdir()} <= set(FILES) and len(FILES) <= 8


def test_make_bench_prints_a_row_a_case_and_names_the_missing(uncompiled, tmp_path, capsys):
    assert cpu_suite.main(["--tiny", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("| forward backward") == 2 and "| in place |" in text
    assert "| linear | float32 | 600 | 8 | 65 |" in text
    assert "liger: missing: liger_kernel is not installed" in text
    assert len(records.read(tmp_path / "results.json")) > 10


class Clock:
    """Seconds that pass when a test says so, however busy the machine is."""

    now = 1000.0

    def monotonic(self):
        return self.now


def test_parts_stop_at_their_time_and_name_what_they_left_out(session, monkeypatch):
    monkeypatch.setattr("benchmarks.session.give_back_memory", lambda device: None)  # it is slow
    clock = Clock()
    monkeypatch.setattr("benchmarks.session.time", clock)
    done = []

    def run(session, item):
        done.append(item.label)
        clock.now += 0.1

    def items(session):
        return [Thing(label) for label in "abcdefgh"]

    part = Part(items, run, minutes=1.0)
    run_parts(session, {"first": part, "second": part}, minutes=0.6 / 60)
    assert done[0] == "a" and done.count("a") == 2  # the second part had its share
    assert len(done) + len(session.left_out) == 16
    assert session.left_out[0].startswith("first: ") and session.left_out[-1] == "second: h"


PROCESS = """if True:
    import os, pathlib, sys
    import torch
    from benchmarks.runner import DeviceLost
    from benchmarks.session import Part, Session, run_parts
    class Thing:
        def __init__(self, label):
            self.label = label
    def run(session, item):
        if item.label == "crashes":
            os._exit(139)
        if item.label == "loses":
            raise DeviceLost("illegal access")
        session.add()
    out, labels, go_on = pathlib.Path(sys.argv[1]), sys.argv[2].split(","), "--go-on" in sys.argv
    session = Session.begin(torch.device("cpu"), out, False, go_on)
    part = Part(lambda session: [Thing(label) for label in labels], run, minutes=1.0)
    try:
        run_parts(session, {"part": part}, 1.0)
    finally:
        session.say(f"left out: {session.left_out}")
"""


def supervised(tmp_path, labels):
    """The exit status, and the log of all processes."""
    code = gpu.supervise([sys.executable, "-c", PROCESS, str(tmp_path), labels], tmp_path, 1.0)
    return code, (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_another_process_goes_on_behind_what_crashed_or_lost_the_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, log = supervised(tmp_path, "a,crashes,b,loses,c")
    assert code == 0
    lines = log.splitlines()
    assert [line for line in lines if line in "abc"] == ["a", "b", "c"]
    assert "part: crashes: its process ended" in lines[-1]
    assert "part: loses: its process ended" in lines[-1]


def test_a_process_that_begins_nothing_is_the_last(tmp_path):
    code = gpu.supervise([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, 1.0)
    assert code == 1


def test_a_process_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    start = time.monotonic()
    assert gpu.supervise(command, tmp_path, 0.0) == 1
    assert time.monotonic() - start < 20


def test_what_fails_is_named_and_the_next_goes_on(session):
    def run(session, item):
        if item.label == "a":
            raise KeyError("broken")

    part = Part(lambda session: [Thing("a"), Thing("b")], run, minutes=1.0)
    run_parts(session, {"part": part}, minutes=1.0)
    assert session.left_out == ["part: a (KeyError: 'broken')"]
    assert "failed: KeyError: 'broken'" in (session.out / "log.txt").read_text()


def test_a_wrong_training_loss_is_named(session, monkeypatch):
    def wrong():
        return lambda logits, targets, normalizer: 2 * torch_loss(logits, targets, normalizer)

    def broken():
        raise ValueError("no loss")

    losses = {OURS: wrong, EAGER: training.LOSSES[EAGER], "other": broken}
    monkeypatch.setattr(training, "LOSSES", losses)
    training.run(session, training.trainings(session)[0])
    notes = {record.provider: record.note for record in session.store.records}
    assert notes[OURS].startswith("wrong loss")
    assert "steps/s" in notes[EAGER]
    assert notes["other"] == "ValueError: no loss"


def test_tests_that_take_too_long_are_stopped_with_their_log(session):
    # a shell: on a busy machine Python takes longer to start than the second that is left
    command = ("sh", "-c", "echo 'tests/x.py::one PASSED [ 5%]'; exec sleep 60")
    session.deadline = time.monotonic() + 1.5
    start = time.monotonic()
    cuda_tests.run(session, cuda_tests.Command("x", command, "tests.log"))
    assert time.monotonic() - start < 20
    assert session.left_out == ["x: stopped at its time limit"]
    assert "  1 passed" in (session.out / "log.txt").read_text()


def test_a_missing_tool_is_named(session):
    command = cuda_tests.Command("x", ("no-such-sanitizer", "x"), "sanitize.log")
    cuda_tests.run(session, command)
    assert "missing: no-such-sanitizer" in (session.out / "log.txt").read_text()


@pytest.mark.slow
def test_cuda_tests_need_no_package_of_babygpt(session, monkeypatch, tmp_path):
    """pytest imports the conftest.py of a folder that it is told to ignore just as little."""
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import sys\n"
        "for name in ('tyro', 'safetensors', 'tqdm', 'matplotlib', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (command,) = cuda_tests.tests(session)
    arguments = [a for a in command.arguments if a not in ("-n", str(cuda_tests.WORKERS))]
    arguments = tuple(a for a in arguments if a not in ("--max-worker-restart", "40"))
    cuda_tests.run(session, cuda_tests.Command("x", (*arguments, "--collect-only"), "tests.log"))
    log = (session.out / "tests.log").read_text()
    assert "tests collected" in log and "rror" not in log.splitlines()[-1], log[-2000:]


@pytest.mark.slow
def test_a_lost_gpu_costs_one_test(tmp_path):
    """A CUDA context that is lost stays so until its process ends, which pytest-xdist replaces."""
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(
        "import torch\n"
        "lost = []\n"
        "def synchronize():\n"
        "    if lost: raise RuntimeError('CUDA error')\n"
        "torch.cuda.is_initialized = lambda: True\n"
        "torch.cuda.synchronize = synchronize\n"
    )
    (tmp_path / "test_x.py").write_text(
        "import conftest, pytest\n"
        "@pytest.mark.parametrize('i', range(8))\n"
        "def test_it(i):\n"
        "    if i == 2: conftest.lost.append(i)\n"
        "    assert not conftest.lost\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-n", "1", "-p", "benchmarks.pytest_gpu"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    passed = {line.split("[")[-1][0] for line in result.stdout.splitlines() if " PASSED " in line}
    assert passed == set("0134567"), result.stdout + result.stderr
    assert "crashed" in result.stdout


def test_outcomes_are_read_from_log_or_junit(tmp_path):
    log, xml = tmp_path / "tests.log", tmp_path / "tests.xml"
    log.write_text(
        "tests/a.py::one[x y] PASSED [ 5%]\ntests/a.py::two FAILED [ 9%]\n"
        "[gw3] [ 10%] SKIPPED tests/b.py::three \n[gw1] [ 12%] PASSED tests/b.py::four[1-2] \n"
        "FAILED tests/a.py::two - assert 1 == 2\n"
    )
    counts, failed = cuda_tests.summary(log, xml)
    assert counts == {"passed": 2, "failed": 1, "skipped": 1} and failed == ["tests/a.py::two"]
    xml.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c">'
        '<failure message="x"/></testcase></testsuite></testsuites>'
    )
    assert cuda_tests.summary(log, xml) == ({"passed": 1, "failed": 1}, ["a::c"])


@pytest.mark.slow
def test_pytest_benchmark_has_the_cases(tmp_path):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "benchmark.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    chosen = "forward_backward-1024x65-float32 and not compile"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-k", chosen, "--benchmark-json", out],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    import json

    benchmarks = json.loads(out.read_text())["benchmarks"]
    assert {b["extra_info"]["provider"] for b in benchmarks} == {"fused_ce", "torch"}
    assert len({b["group"] for b in benchmarks}) == 1
    assert all(b["extra_info"]["bytes_moved"] == 2 * 1024 * 65 * 4 for b in benchmarks)
    assert "liger_kernel is not installed" in result.stdout
