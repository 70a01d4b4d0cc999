"""The sweep: which variants it tries, in which order, and what it does with those that fail."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sweep
from benchmarks.cases import Case
from fused_ce.kernels import policy as launch_policy

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Config:
    block_v: int = 512
    num_warps: int = 4
    unroll: int = 2


def test_the_least_different_come_first_and_a_block_follows_from_its_warps():
    fields = [
        {"num_warps": 8, "block_v": 1024, "unroll": 4},
        {"num_warps": 8, "block_v": 1024},
        {"unroll": 4},
        {"unroll": 2},
    ]
    found = sweep.variants([Config(), Config(unroll=8)], fields)
    assert found[:2] == [Config(), Config(unroll=8)]
    assert found[2:] == [Config(1024, 8), Config(unroll=4), Config(1024, 8, 4)]


@pytest.mark.parametrize("element_size", [2, 4])
def test_grids_are_configurations_of_the_policy(element_size):
    for policy in ("held_config", "stream_config", "small_config"):
        chosen = (
            launch_policy.small_config(65) if policy == "small_config"
            else getattr(launch_policy, policy)(50257, element_size)
        )  # fmt: skip
        found = list(sweep.grid(policy, element_size))
        tried = sweep.variants([chosen], iter(found))
        assert len(tried) <= 130
        assert chosen in [dataclasses.replace(chosen, **fields) for fields in found]
        for config in tried:
            if policy != "small_config":
                assert config.block_v * element_size == 16 * 32 * config.num_warps
                assert config.held == 0 or config.held >= config.unroll
            assert config.num_warps <= 32


@pytest.mark.parametrize(
    "name, vocab_size", [("held_config", 1100), ("stream_config", 1100), ("small_config", 65)]
)
def test_a_variant_is_what_is_launched(monkeypatch, name, vocab_size):
    """And not what the policy would choose."""
    pytest.importorskip("triton")
    from benchmarks import codegen
    from fused_ce.kernels.dispatch import Kernel

    sizes = (vocab_size,) if name == "small_config" else (vocab_size, 4)
    config = getattr(launch_policy, name)(*sizes)
    changed = dataclasses.replace(config, block_v=4 * config.block_v, num_warps=16)
    launched = []

    def record(self, grid, tensors, numbers, num_warps, **constants):
        launched.append((constants.get("BLOCK_V"), num_warps))

    monkeypatch.setattr(Kernel, "launch", record)
    for chosen in (False, True):
        with sweep._returning(name, changed) if chosen else contextlib.nullcontext():
            list(codegen.launches(codegen.Case(vocab_size, "float32")))
        assert ((changed.block_v, 16) in launched) == chosen
        assert ((config.block_v, config.num_warps) in launched) != chosen
        launched.clear()


def test_table_has_the_fastest_first_the_chosen_always_and_the_failed_last(monkeypatch):
    monkeypatch.setattr(sweep, "SHOWN", 1)
    timed = {"spread": 0.1, "fraction_of_clone": 0.9}
    results = [
        {"config": {"unroll": 8}, "chosen": False, "error": "out of resources"},
        {"config": {"unroll": 1}, "chosen": True, "ms": 3.0, **timed},
        {"config": {"unroll": 4}, "chosen": False, "ms": 2.0, **timed},
        {"config": {"unroll": 2}, "chosen": False, "ms": 1.0, **timed},
    ]
    lines = sweep.table(results).splitlines()
    assert [line.split("  ")[-1] for line in lines[:1]] == ["unroll=2"]
    assert lines[1].endswith("unroll=1  <- as it is") and "90.0% of clone" in lines[1]
    assert lines[2].endswith("failed: unroll=8: out of resources") and len(lines) == 3


@pytest.fixture
def one(monkeypatch):
    cases = tuple(Case("forward_backward", 2, size, "float32") for size in (1100, 2100))
    made = sweep.Sweep("held_config", cases, 1.0)
    monkeypatch.setattr(sweep, "sweeps", lambda session: [made])
    monkeypatch.setattr(sweep, "TURNS", 1)
    return made


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled")
def test_variants_are_timed_and_those_that_fail_are_kept(session, one):
    """In Triton's interpreter, where a block that is no power of two does not compile either."""
    pytest.importorskip("triton")
    session.deadline = float("inf")

    def fields(policy, element_size):
        assert (policy, element_size) == ("held_config", 4)
        return iter([{"unroll": 1}, {"block_v": 1000}])

    sweep.run(session, one, fields)
    results = json.loads((session.out / "sweep.json").read_text())
    timed = [r for r in results if "ms" in r]
    assert {r["vocab_size"] for r in timed if r["config"]["unroll"] == 1} == {1100, 2100}
    assert all(r["ms"] > 0 and r["error_of_result"] < 1e-5 for r in timed)
    assert all(0 < r["fraction_of_clone"] for r in timed)
    failed = [r for r in results if "ms" not in r]
    assert failed and all(r["config"]["block_v"] == 1000 and r["error"] for r in failed)
    assert {r["vocab_size"] for r in results if r["chosen"]} == {1100, 2100}
    assert "as it is" in (session.out / "log.txt").read_text()


def test_sweep_that_runs_out_of_time_says_what_is_left(session, one, monkeypatch):
    monkeypatch.setattr(sweep, "_chosen", lambda *_: Config())
    monkeypatch.setattr(sweep, "_kernels", lambda device: __import__("contextlib").nullcontext())
    session.deadline = 0.0
    sweep.run(session, one, lambda *_: iter([{"unroll": n} for n in (1, 2, 4)]))
    assert session.left_out == [f"sweep: 3 variants of {one.label}"]


@pytest.mark.slow
def test_a_variant_is_compiled_without_a_gpu(tmp_path):
    """So that a GPU does not wait for it; in a process without the interpreter."""
    pytest.importorskip("triton")
    code = """if True:
        import dataclasses
        from benchmarks import sweep
        from benchmarks.cases import Case
        from fused_ce.kernels import policy
        case = Case("forward_backward", 8192, 50257, "bfloat16")
        config = dataclasses.replace(policy.held_config(50257, 2), unroll=1, held=2)
        assert sweep.compile_variant("sm_90", "held_config", case, config)
        wrong = dataclasses.replace(config, unroll=4)
        assert not sweep.compile_variant("sm_90", "held_config", case, wrong)
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.rglob("cross_entropy_forward_with_grad_kernel.cubin"))
