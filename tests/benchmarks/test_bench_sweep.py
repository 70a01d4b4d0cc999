"""The sweep: which variants it tries, in which order, and what it does with those that fail."""

import dataclasses
import json
import os

import pytest

from benchmarks import sweep
from benchmarks.cases import Case


@dataclasses.dataclass(frozen=True)
class Config:
    block: int = 2
    warps: int = 4


def test_single_changes_come_first_and_unknown_fields_are_reported():
    changes, unknown = sweep.variants(
        Config(), {"block": (1, 2), "warps": (8, 16), "held_tiles": (1,)}
    )
    assert unknown == ["held_tiles"]
    assert changes[0] == {}
    assert changes[1:4] == [{"block": 1}, {"warps": 8}, {"warps": 16}]
    assert changes[4:] == [{"block": 1, "warps": 8}, {"block": 1, "warps": 16}]


def test_table_has_the_fastest_first_and_the_failed_last():
    results = [
        {"change": {"warps": 8}, "error": "out of resources"},
        {"change": {}, "ms": 2.0, "spread": 0.1},
        {"change": {"block": 1}, "ms": 1.0, "spread": 0.1},
    ]
    lines = sweep.table(results).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[:2]] == ["block=1", "as it is"]
    assert lines[2].endswith("failed: warps=8: out of resources")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled")
def test_variants_are_timed_and_those_that_fail_are_kept(session, monkeypatch):
    """In Triton's interpreter, where a block that is no power of two does not compile either."""
    pytest.importorskip("triton")
    case = Case("forward_backward", 2, 1100, "float32")
    one = sweep.Sweep("stream_config", case)
    monkeypatch.setattr(sweep, "sweeps", lambda session: [one])
    monkeypatch.setattr(sweep, "TURNS", 1)
    grid = {"stream_config": {"block_v": (1000, 256), "no_such_field": (1,)}}
    sweep.run(session, one, grid)
    results = json.loads((session.out / "sweep.json").read_text())
    by_block = {result["config"]["block_v"]: result for result in results}
    assert by_block[256]["ms"] > 0 and by_block[256]["gradient_error"] < 1e-5
    assert "error" in by_block[1000] and "ms" not in by_block[1000]
    assert len(results) == 3 and results[0]["change"] == {}
    log = (session.out / "log.txt").read_text()
    assert "has no field no_such_field" in log and "as it is" in log


def test_sweep_that_runs_out_of_time_says_what_is_left(session, monkeypatch):
    one = sweep.Sweep("stream_config", Case("forward_backward", 2, 1100, "float32"))
    monkeypatch.setattr(sweep, "sweeps", lambda session: [one])
    monkeypatch.setattr(sweep, "_default", lambda *_: Config())
    monkeypatch.setattr(sweep, "_kernels", lambda device: __import__("contextlib").nullcontext())
    session.deadline = 0.0
    sweep.run(session, one, {"stream_config": {"block": (1, 2, 4)}})
    assert session.left_out == [f"sweep: 3 variants of {one.label}"]
