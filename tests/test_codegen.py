"""The compiled kernels: what can be known of their speed without a GPU.

kernels/ promises 16-byte accesses, no spills and a budget of instructions per element; a change
of a mask or of a stride's type can lose all three without a wrong number anywhere.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
STREAM = (
    "cross_entropy_forward_kernel", "cross_entropy_forward_with_grad_kernel",
    "cross_entropy_backward_kernel", "scale_kernel",
)  # fmt: skip


def compiled(*target, what="kernels"):
    """What compile_kernels.py reports for a target."""
    result = subprocess.run(
        [sys.executable, HERE / "compile_kernels.py", *target, what],
        capture_output=True, text=True, timeout=500,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def accesses(opcodes, kind):
    return [opcode for opcode in opcodes if opcode.startswith(kind)]


def is_wide(opcode):
    return ".128" in opcode


def bulk_loops(report):
    """The loops that read a full step: one 16-byte load a tile, or more where weights come too."""
    unroll = report["unroll"]
    return [
        loop for loop in report["loops"]
        if len([op for op in accesses(loop, "LDG") if is_wide(op)]) >= unroll
    ]  # fmt: skip


def bulk_loop(report, stores=False):
    """The loop over full steps, of the statistics or of the gradient."""
    loops = [loop for loop in bulk_loops(report) if bool(accesses(loop, "STG")) == stores]
    assert loops, "no loop of 16-byte loads"
    return max(loops, key=len)  # a tail that the compiler unrolled by the same factor is shorter


def check_no_spills(report):
    assert report["stack"] == 0
    assert not accesses(report["opcodes"], ("LDL", "STL"))


def check_registers(report):
    """64: then 1,024 threads fit on a multiprocessor, whatever the block."""
    if report["kernel"] in STREAM:
        assert report["registers"] <= 64


def check_16_bytes(report):
    """In every loop over full steps; class weights are float32 and lie where they lie."""
    if report["kernel"] in (*STREAM[:2], "scale_kernel"):
        narrow = [
            opcode
            for loop in bulk_loops(report)
            for opcode in accesses(loop, ("LDG", "STG"))
            if not is_wide(opcode)
        ]
        if report["kernel"] == "scale_kernel":  # its outer loop has the edges in it, and the factor
            narrow = [op for op in accesses(min(bulk_loops(report), key=len), "STG.E.U16")][1:]
        assert all(op.startswith("LDG.E") and "all-options" in report["case"] for op in narrow)


def check_whole_tiles(report):
    if report["kernel"] == "cross_entropy_forward_with_grad_kernel":
        stores = accesses(bulk_loop(report, stores=True), "STG")
        assert len(stores) == report["unroll"] and all(map(is_wide, stores))


def check_backward(report):
    """It has no loop: a wide store a tile, and two narrow ones, an edge and the target's column."""
    if report["kernel"] == "cross_entropy_backward_kernel":
        loads, stores = (accesses(report["opcodes"], kind) for kind in ("LDG", "STG"))
        assert sum(map(is_wide, loads)) >= report["unroll"]
        assert sum(map(is_wide, stores)) == report["unroll"]
        assert len(stores) == report["unroll"] + 2


def check_budget(report):
    """Instructions an element; at full bandwidth there is time for about 14 in 2 bytes."""
    if "all-options" in report["case"] or report["kernel"] not in STREAM[:2]:
        return
    half = "bf16" in report["case"]
    statistics = len(bulk_loop(report)) / report["elements_a_step"]
    assert statistics <= (7.5 if half else 9.0)
    if report["kernel"] == "cross_entropy_forward_with_grad_kernel" and half:
        gradient = len(bulk_loop(report, stores=True)) / report["elements_a_step"]
        assert statistics + gradient <= 14.5


def test_machine_code_for_sm_90():
    """Every check on every kernel, all failures at once: compiling takes the time."""
    reports = compiled("cuda", "90", "32")
    if "opcodes" not in reports[0]:
        pytest.skip("this Triton comes without nvdisasm")
    failures = []
    for report in reports:
        for check in (check_no_spills, check_registers, check_16_bytes, check_whole_tiles,
                      check_backward, check_budget):  # fmt: skip
            try:
                check(report)
            except AssertionError as error:
                failures.append(f"{report['case']} {report['kernel']} {check.__name__}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    "target", [("cuda", "80", "32"), ("cuda", "100", "32"), ("hip", "gfx942", "64")], ids=" ".join
)
def test_kernels_compile(target):
    reports = compiled(*target)
    names = {*STREAM, "cross_entropy_small_kernel", "mean_divisor_kernel", "reduce_losses_kernel"}
    assert names <= {report["kernel"] for report in reports}
    for report in reports:
        assert report.get("stack", 0) == 0, f"{report['case']} {report['kernel']} spills"
        assert report["num_warps"] * int(target[2]) <= 1024


def test_batch_sizes_compile_nothing_new():
    """Triton makes a binary for every 1 and every multiple of 16, unless told not to."""
    binaries = compiled("cuda", "90", "32", what="binaries")
    assert binaries["stream"] and binaries["tiny"]
    assert all(count == 1 for count in binaries["stream"].values()), binaries["stream"]
    assert all(count == 1 for count in binaries["tiny"].values()), binaries["tiny"]
