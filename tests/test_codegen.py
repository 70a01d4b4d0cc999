"""The compiled kernels: what can be known of their speed without a GPU.

kernels/ promises 16-byte accesses, no spills and a budget of instructions per element; a change
of a mask or of a stride's type can lose all three without a wrong number anywhere.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import codegen  # noqa: E402
from benchmarks.codegen import Case, accesses  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FORWARD, FUSED = "cross_entropy_forward_kernel", "cross_entropy_forward_with_grad_kernel"
SPLIT, BACKWARD = "cross_entropy_split_kernel", "cross_entropy_backward_kernel"
SMALL, PREPARE = "cross_entropy_small_kernel", "prepare_kernel"
TANGENTS = "cross_entropy_tangents_kernel"
STREAM = (FORWARD, FUSED, SPLIT, BACKWARD, "scale_kernel")
REDUCING = (FORWARD, FUSED, SPLIT, SMALL)

# What the variants of plain bfloat16 do not cover, each for a reason of its own.
OTHERS = [
    *(Case(vocab_size, "float32") for vocab_size in (65, 1025, 6148, 50257, 128256)),
    Case(50257, "float32", n_rows=2),
    Case(50257, "float16"),
    *(Case(50257, dtype, "stats") for dtype in ("float16", "float32")),
    *(Case(50257, dtype, "stats", n_rows=2) for dtype in ("bfloat16", "float16")),
    Case(50257, "float64"),
    Case(50257, "bfloat16", misaligned=3),
    Case(65, "float16"),
    Case(65, "float64"),
    *(Case(20, dtype, "stats") for dtype in ("bfloat16", "float32", "float64")),
    Case(20, "float32", "everything"),
    Case(9001, "float32", "stats", n_rows=2),
    *(Case(50257, "bfloat16", options) for options in codegen.OPTIONS if options != "plain"),
    Case(128256, "bfloat16", "weight, smoothing", n_rows=2),
    Case(6148, "float32", "weight, smoothing"),
    Case(50257, "float64", "weight, smoothing"),
    Case(50257, "float32", "everything"),
    *(Case(50257, dtype, "softcap") for dtype in ("float16", "float32")),
    Case(50257, "bfloat16", "softcap", n_rows=2),
    Case(6148, "bfloat16", "probabilities"),
    Case(65, "bfloat16", "everything"),
    Case(50257, "bfloat16", tangents=True, misaligned=3),
    Case(50257, "bfloat16", "everything", tangents=True),
    Case(128256, "float16", "weight, smoothing", tangents=True),
    Case(50257, "float32", tangents=True),
]
CHEAP = ("plain", "weight", "sample_weight, z_loss")  # no more work for a logit
LOADED = ("weight, smoothing", "everything")  # class weights for every logit
ONE_OF_EACH = [Case(128256, "bfloat16"), Case(128256, "bfloat16", n_rows=2), Case(65, "bfloat16"),
               Case(50257, "float32", "weight, smoothing"), Case(6148, "float64"),
               Case(50257, "bfloat16", tangents=True)]  # fmt: skip


def run(*arguments):
    """What `python -m benchmarks.codegen` prints, in a process that does not interpret."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.codegen", *arguments],
        capture_output=True, text=True, timeout=500, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def compiled(target, cases):
    return run(
        "--json", "--target", target, "--cases", json.dumps([dataclasses.asdict(c) for c in cases])
    )


def machine_code():
    """Every variant in bfloat16, whose form the others share, and the other cases, for sm_90."""
    variants = run("--json", "--dtype", "bfloat16")
    found = variants + compiled("sm_90", OTHERS)
    if "opcodes" not in found[0]:
        pytest.skip("this Triton comes without nvdisasm")
    return found


def check_no_spills(report):
    """None; in rare cases two numbers, and none in a loop over full steps."""
    if report["kernel"] == SMALL and report["dtype"] == "float64" and report["vocab_size"] < 65:
        return  # sixteen rows of doubles a thread: 504 bytes, in a kernel without a loop
    assert report["stack"] <= allowed_stack(report)
    if allowed_stack(report):
        assert not any(accesses(loop, ("LDL", "STL")) for loop in codegen.bulk_loops(report))
    else:
        assert not accesses(report["opcodes"], ("LDL", "STL"))


def is_rare(report):
    """Whether a logit takes more registers than its softmax does."""
    heavy = report["options"] in ("softcap", "probabilities", *LOADED)
    return report["dtype"] == "float64" or heavy


def allowed_stack(report):
    return 16 if is_rare(report) else 0  # bytes


def check_registers(report):
    """64: then 1,024 threads fit on a multiprocessor, whatever the block; more for rare cases."""
    if report["kernel"] in (*STREAM, TANGENTS):
        assert report["registers"] <= (128 if is_rare(report) else 64)


def check_16_bytes(report):
    """In every loop over full steps; class weights are float32 and lie where they lie."""
    if report["kernel"] in (FORWARD, FUSED, SPLIT, TANGENTS):
        assert report["statistics_instructions"] is not None, "no loop of 16-byte loads"
        narrow = [
            opcode
            for loop in codegen.bulk_loops(report)
            for opcode in accesses(loop, ("LDG", "STG"), wide=False)
        ]
        assert all(op.startswith("LDG.E") and report["options"] in LOADED for op in narrow)


def check_whole_tiles(report):
    if report["kernel"] == FUSED:
        stores = accesses(codegen.bulk_loop(report, stores=True), "STG")
        assert stores == accesses(stores, "STG", wide=True) and len(stores) == report["unroll"]


def check_held_tiles(report):
    """Each is loaded once and stored once, 16 bytes at a time; then come steps of the two loops."""
    if report["kernel"] == FUSED:
        wide = len(accesses(report["opcodes"], "LDG", True))
        if has_probabilities(report):  # beside the logits in each of the loops
            wide -= 2 * (report["held"] + report["unroll"])
        if report["options"] in ("stats", "everything"):  # the tile of the maximum once more
            wide -= 1
        assert wide == report["held"] + 2 * report["unroll"]
        # and zeros for ignored rows, whose loop is unrolled and has a rest
        assert len(accesses(report["opcodes"], "STG", True)) >= report["held"] + report["unroll"]


def check_backward(report):
    """It has no loop: a wide store a tile, and two narrow ones, an edge and the target's column.

    With probabilities two wide ones, and two edges.
    """
    if report["kernel"] == BACKWARD:
        both = 2 if has_probabilities(report) and len(accesses(report["opcodes"], "STG")) > 6 else 1
        assert len(accesses(report["opcodes"], "LDG", True)) >= both * report["unroll"]
        assert len(accesses(report["opcodes"], "STG", True)) == both * report["unroll"]
        assert len(accesses(report["opcodes"], "STG", False)) <= 2


def has_probabilities(report):
    return report["options"] in ("probabilities", "everything")


def check_tangents(report):
    """Logits and direction, 16 bytes each, in the loop over the sums and in that of the gradient.

    With probabilities their direction too, and of sums, or under a cap, they themselves.
    """
    if report["kernel"] == TANGENTS:
        both = 2 if has_probabilities(report) else 1
        for stores in (False, True):
            loop = codegen.bulk_loop(report, stores)
            if loop or not stores:  # not all of them write a gradient
                assert len(accesses(loop, "LDG", True)) >= (1 + both) * report["unroll"]
                assert len(accesses(loop, "STG", True)) == stores * both * report["unroll"]
        if report["options"] in CHEAP and report["dtype"] == "bfloat16":
            assert report["statistics_instructions"] <= 16.5
            assert (report["gradient_instructions"] or 0.0) <= 13.0


def check_scale(report):
    """In flight together, and one narrow load and store for the edges of a row."""
    if report["kernel"] == "scale_kernel":
        inner = min(codegen.bulk_loops(report), key=len)
        assert len(accesses(inner, "STG", True)) == report["unroll"]
        assert not accesses(inner, ("LDG", "STG"), False)


def check_budget(report):
    """Instructions an element; at full bandwidth there is time for about 14 in 2 bytes."""
    if report["kernel"] not in (FORWARD, FUSED, SPLIT) or report["dtype"] == "float64":
        return
    statistics, gradient = report["statistics_instructions"], report["gradient_instructions"]
    if report["options"] in CHEAP:
        half = report["dtype"] != "float32"
        assert statistics <= (7.5 if half else 9.5)
        if report["kernel"] == FUSED and half:
            assert statistics + gradient <= 14.0
    if report["options"] == "stats":
        assert statistics <= 10.0 and (gradient or 0.0) <= 7.0
    if report["options"] == "softcap":
        # float16 takes more to unpack, a part of a row to say where it lies
        more = 0.6 if report["dtype"] == "float16" or report["kernel"] == SPLIT else 0.0
        assert statistics <= 20.0 + more and (gradient or 0.0) <= 23.0 + more
    if report["options"] in ("stats", "softcap"):
        assert report["kernel"] != FUSED or report["num_warps"] == 32  # so 64 registers


def check_small(report):
    """Instructions an element on the whole path to the count of programs, which most end with."""
    if report["kernel"] == SMALL and report["options"] == "plain" and report["vocab_size"] == 65:
        if report["dtype"] in ("bfloat16", "float16", "float32"):
            opcodes = report["opcodes"]
            counts = [at for at, opcode in enumerate(opcodes) if opcode.startswith("ATOMG")]
            rows = report["num_warps"] * 512 // 128
            path = min([*counts, len(opcodes)]) * report["num_warps"] * 32
            assert path <= 58 * rows * report["vocab_size"]


def check_order_of_memory(report):
    """Who comes last must see what the others stored: a release by all, an acquire by the last.

    The compiler drops an acquire whose result is not used, and no interpreter notices.
    """
    if report["kernel"] in REDUCING and not (report["kernel"] == SMALL and is_backward(report)):
        opcodes = report["opcodes"]
        tickets = accesses(opcodes, "ATOMG")
        assert len(tickets) >= 1
        assert len(accesses(opcodes, "MEMBAR")) >= len(tickets)
        assert len(accesses(opcodes, "CCTL.IVALL")) == len(tickets)


def is_backward(report):
    return not accesses(report["opcodes"], "ATOMG")


def check_lanes_agree(report):
    """On every sum of a row: whoever stores it, stores the same bits.

    Triton lets all lanes that have a value store it to one shared address, and one of them wins.
    """
    assert report["uneven_sums"] == []


CHECKS = [
    check_lanes_agree, check_no_spills, check_registers, check_16_bytes, check_whole_tiles,
    check_held_tiles, check_backward, check_tangents, check_scale, check_budget,
    check_small, check_order_of_memory,
]  # fmt: skip


@pytest.mark.slow
def test_machine_code_for_sm_90():
    """Every check on every variant, all failures at once: compiling takes the time."""
    reports = machine_code()
    assert {report["kernel"] for report in reports} == {*STREAM, SMALL, PREPARE, TANGENTS}
    written = [r["gradient_instructions"] is not None for r in reports if r["kernel"] == TANGENTS]
    assert written == len(written) // 2 * [False, True]
    small = [r for r in reports if r["kernel"] == SMALL and r["options"] == "plain"]
    assert {is_backward(report) for report in small} == {True, False}
    failures = []
    for report in reports:
        for check in CHECKS:
            try:
                check(report)
            except AssertionError as error:
                case = f"{report['kernel']} {report['dtype']} {report['vocab_size']}"
                failures.append(f"{case} {report['options']}, {check.__name__}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("target", [name for name in codegen.TARGETS if name != "sm_90"])
def test_kernels_compile(target):
    reports = compiled(target, ONE_OF_EACH)
    assert {*STREAM, SMALL, PREPARE, TANGENTS} == {report["kernel"] for report in reports}
    for report in reports:
        stack, most = report.get("stack", 0), allowed_stack(report)
        assert stack <= most, f"{report['kernel']} {report['dtype']} spills"
        assert report["num_warps"] * codegen.TARGETS[target].warp_size <= 1024


@pytest.mark.slow
def test_shards_cost_a_row_but_no_element():
    """The loops are those of whole rows, and so are registers and wide accesses."""
    chosen = [
        Case(50257, "bfloat16", options, n_rows)
        for options in ("plain", "stats", "weight, smoothing")
        for n_rows in (200, 2)
    ]
    shards = [dataclasses.replace(case, sharded=True) for case in chosen]
    whole = {(r["kernel"], r["options"], r["num_warps"]): r for r in compiled("sm_90", chosen)}
    found = compiled("sm_90", shards)
    assert {r["kernel"] for r in found} == {FORWARD, SPLIT, BACKWARD, PREPARE}
    for shard in found:
        if shard["kernel"] == PREPARE or "opcodes" not in shard:
            continue
        other = whole[shard["kernel"], shard["options"], shard["num_warps"]]
        for check in (check_lanes_agree, check_no_spills, check_registers, check_16_bytes):
            check(shard)
        key = "statistics_instructions"
        # one instruction a step of 32 elements is how the compiler counts
        assert shard[key] is other[key] is None or shard[key] <= other[key] + 0.05
        for kind in ("LDG", "STG"):
            counts = [len(accesses(r["opcodes"], kind, True)) for r in (shard, other)]
            assert counts[0] == counts[1], (shard["kernel"], shard["options"], kind)
        if shard["kernel"] == BACKWARD:  # it has no loop
            assert len(shard["opcodes"]) <= len(other["opcodes"]) + 60


@pytest.mark.slow
def test_batch_sizes_compile_nothing_new():
    """Triton makes a binary for every 1 and every multiple of 16, unless told not to."""
    binaries = run("--binaries")
    assert len(binaries) > 8
    assert all(count == 1 for count in binaries.values()), binaries


def test_a_mean_is_two_launches_and_its_backward_one():
    """With every option, on rows of every kind; derivatives along a direction are one, too."""
    cases = [
        Case(vocab_size, "bfloat16", options, n_rows, tangents=tangents)
        for vocab_size, n_rows in ((65, 200), (50257, 200), (50257, 2))
        for options in codegen.OPTIONS
        for tangents in (False, True)
    ]
    found = run("--launches", "--cases", json.dumps([dataclasses.asdict(c) for c in cases]))
    assert len(found) == len(cases)
    for case, names in zip(cases, found, strict=True):
        if case.tangents:
            assert names == {"tangents": [TANGENTS], "tangents of the gradient": [TANGENTS]}
            continue
        small, split = case.vocab_size == 65, case.n_rows == 2
        assert names["forward"] == [PREPARE, SPLIT if split else SMALL if small else FORWARD]
        with_grad = [SPLIT, BACKWARD] if split else [SMALL if small else FUSED]
        assert names["forward_with_grad"] == [PREPARE, *with_grad]
        assert names["backward"] == [SMALL if small else BACKWARD]
        assert names["scale"] == ["scale_kernel"]


@pytest.mark.parametrize("code, is_uneven", [
    pytest.param("add.f32 %f5, %f3, %f4;", True, id="a-product-that-may-be-fused"),
    pytest.param("add.f32 %f5, %f4, %f3;", True, id="on-either-side"),
    pytest.param("fma.rn.f32 %f5, %f1, %f2, %f4;", True, id="a-product-that-is-fused"),
    pytest.param("fma.rn.f32 %f6, %f1, %f2, 0f00000000; add.f32 %f5, %f6, %f4;", False,
                 id="a-product-that-was-rounded"),
    pytest.param("add.f32 %f5, %f1, %f4;", False, id="no-product"),
    pytest.param("fma.rn.f32 %f5, %f1, %f2, %f3;", False, id="no-sum-of-lanes"),
])  # fmt: skip
def test_sums_into_which_a_product_is_fused(code, is_uneven):
    ptx = """
        mul.f32 %f3, %f1, %f2;
        mov.b32 %r1, %f3;
        shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;
        mov.b32 %f4, %r2;
        """ + code.replace("; ", ";\n")
    assert bool(codegen.uneven_sums(ptx)) == is_uneven


def test_sums_of_64_bits_into_which_a_product_is_fused():
    """They are exchanged in halves."""
    ptx = """
        mov.b64 {%r1, %r2}, %fd1;
        shfl.sync.bfly.b32 %r3, %r1, 16, 31, -1;
        shfl.sync.bfly.b32 %r4, %r2, 16, 31, -1;
        cvt.u64.u32 %rd1, %r3;
        cvt.u64.u32 %rd2, %r4;
        shl.b64 %rd3, %rd2, 32;
        or.b64 %rd4, %rd1, %rd3;
        fma.rn.f64 %rd5, %rd6, %rd7, %rd4;
        """
    assert codegen.uneven_sums(ptx) == ["fma.rn.f64 %rd5, %rd6, %rd7, %rd4"]


def test_report_names_what_it_counts():
    report = {
        **dataclasses.asdict(Case(50257, "bfloat16")), "kernel": FORWARD, "block": 2048,
        "unroll": 4, "held": 0, "num_warps": 8, "registers": 48, "stack": 0, "shared": 32,
        "opcodes": ["LDG.E.EF.128", "LDG.E.U16", "STG.E", "FADD"],
        "statistics_instructions": 6.6875, "gradient_instructions": None,
    }  # fmt: skip
    *_, line = codegen.table([report])
    assert "| 1 / 1 | 0 / 1 | 6.69 |  |" in line and "50,257" in line
