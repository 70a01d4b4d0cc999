"""Compile every kernel that the launchers can choose, without a GPU, and count its machine code.

`python -m benchmarks.codegen` prints registers, spills, access widths and instructions an element
of each variant for sm_90; `--target gfx942` and the like for another GPU, `--json` for programs.
The kernels are compiled by calling the launchers, under a driver that has no device.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # triton reads it when it is first imported

import torch
import triton
from triton.backends.compiler import GPUTarget

from fused_ce.kernels import launch, policy
from fused_ce.kernels.dispatch import Kernel
from fused_ce.options import LossOptions
from fused_ce.rows import Direction, Rows, Upstream, empty_gradient
from fused_ce.shards import Shard

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
OPTIONS = {  # the options, and which tensors beside logits and class indices
    "plain": ({}, ()),
    "smoothing": ({"label_smoothing": 0.1}, ()),
    "weight": ({}, ("weight",)),
    "weight, smoothing": ({"label_smoothing": 0.1}, ("weight",)),
    "sample_weight, z_loss": ({"z_loss": 1e-4}, ("sample_weight",)),
    "logit_scale": ({"logit_scale": 0.5}, ()),
    "softcap": ({"softcap": 30.0}, ()),
    "stats": ({"return_stats": True}, ()),
    "probabilities": ({}, ("probabilities",)),
    "everything": (
        {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "return_stats": True},
        ("weight", "sample_weight", "probabilities"),
    ),
}
REAL_VOCABS = (65, 6148, 32000, 50257, 128256, 256000)
BATCHES = ((1, 1), (1, 2), (16, 1), (1, 16), (3, 5))  # 1 and multiples of 16 tempt Triton


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the launchers: what it compiles depends on no more than this."""

    vocab_size: int
    dtype: str
    options: str = "plain"
    n_rows: int = 200  # one program each; fewer rows are split
    misaligned: int = 0
    tangents: bool = False  # the derivatives along a direction instead of the loss
    sharded: bool = False  # the logits are some columns of a larger vocabulary


class CompileOnly:
    """A driver that knows its target and has no device."""

    def __init__(self, target: GPUTarget):
        """Compile for `target`."""
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def compile_for(name: str) -> None:
    """From now on kernels are compiled for this target of TARGETS, and nothing is launched."""
    target = TARGETS[name]
    triton.runtime.driver.set_active(CompileOnly(target))
    policy.warp_size_of = lambda device: target.warp_size


def launched(calls: Iterator[str]) -> list[tuple]:
    """The kernels that `launches` would launch, compiled: [(name, CompiledKernel, constants)]."""
    kernels = []

    def compile_only(self, grid, tensors, numbers, num_warps, **constants):
        kernel = self.jitted.warmup(*tensors, *numbers, **constants, num_warps=num_warps, grid=grid)
        given = "".join("-" if tensor is None else "x" for tensor in tensors)
        kernels.append((self.jitted.__name__, kernel, {**constants, "given": given}))

    with mock.patch.object(Kernel, "launch", compile_only):
        for _ in calls:
            pass
    return kernels


def launches(case: Case, batch: tuple[int, int] | None = None) -> Iterator[str]:
    """Call the functions of launch.py one after the other, as autograd.py does; yield its name."""
    batch = batch or (1, case.n_rows)
    size = batch[0] * batch[1] * case.vocab_size
    # Never read or written: not a page of it is ever touched.
    storage = torch.empty(size + case.misaligned, dtype=DTYPES[case.dtype])
    logits = storage[case.misaligned :].view(*batch, case.vocab_size)
    settings, tensors = OPTIONS[case.options]
    options = LossOptions(reduction="mean", **settings)
    rows = Rows(
        logits,
        torch.empty_like(logits)
        if "probabilities" in tensors
        else torch.zeros(batch, dtype=torch.long),
        torch.ones(case.vocab_size) if "weight" in tensors else None,
        torch.ones(batch[0] * batch[1]) if "sample_weight" in tensors else None,
    )
    if case.tangents:
        yield from tangent_launches(rows, options)
        return
    if case.sharded:
        yield from shard_launches(rows, options)
        return
    gradient, one = empty_gradient(logits), torch.ones(())
    result = launch.forward(rows, options)
    yield "forward"
    launch.forward_with_grad(rows, options, gradient)
    yield "forward_with_grad"
    upstream, grad_targets = Upstream(one), None
    if options.return_stats:
        upstream = Upstream(one, result.lse, result.entropy)
    if rows.has_probabilities:
        grad_targets = empty_gradient(rows.targets)
    launch.backward(upstream, rows, result.saved, options, gradient, grad_targets)
    yield "backward"
    launch.scale(gradient, one, gradient)
    yield "scale"


def shard_launches(rows: Rows, options: LossOptions) -> Iterator[str]:
    """What a rank launches for its columns."""
    shard = Shard(first=50_000, n_classes=400_000)
    of_row, row_sum, *_ = launch.shard_statistics(rows, options, shard)
    yield "shard_statistics"
    upstream = Upstream(*(of_row, of_row, of_row)[: 3 if options.return_stats else 1])
    statistics = of_row, row_sum, of_row, upstream.entropy
    launch.shard_gradient(upstream, rows, statistics, options, shard, empty_gradient(rows.logits))
    yield "shard_gradient"


def tangent_launches(rows: Rows, options: LossOptions) -> Iterator[str]:
    """Those of forward-mode differentiation, and of differentiating twice."""
    logits, targets = rows.logits, rows.targets
    probabilities = targets if rows.has_probabilities else None
    direction, upstream = Direction(logits, probabilities), torch.ones(logits.shape[:2].numel())
    launch.tangents(direction, Upstream(None), rows, options)
    yield "tangents"
    stats = upstream if options.return_stats else None
    gradients = [None if t is None else empty_gradient(t) for t in direction]
    launch.tangents(direction, Upstream(upstream, stats, stats), rows, options, *gradients)
    yield "tangents of the gradient"


def cases(dtype: str, target: str) -> Iterator[Case]:
    """Those that choose every variant in this dtype, real vocabularies before round numbers."""
    element_size, warp_size = DTYPES[dtype].itemsize, TARGETS[target].warp_size
    seen = set()
    for variant in policy.variants(element_size, warp_size, REAL_VOCABS):
        if (variant.n_rows, variant.vocab_size) not in seen:
            seen.add((variant.n_rows, variant.vocab_size))
            yield Case(variant.vocab_size, dtype, n_rows=variant.n_rows)


def reports(target: str, chosen: Iterator[Case]) -> Iterator[dict]:
    """One a kernel and binary, in the order of compilation."""
    compile_for(target)
    seen = set()
    for case in chosen:
        for name, kernel, constants in launched(launches(case)):
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                yield dataclasses.asdict(case) | report(name, kernel, constants, case.dtype)


def report(name, kernel, constants, dtype) -> dict:
    """What is known of a compiled kernel; of machine code for NVIDIA alone."""
    result = {
        "kernel": name,
        "block": constants.get("BLOCK_V", constants.get("BLOCK")),
        "unroll": constants.get("UNROLL", 1),
        "held": constants.get("HELD", 0),
        "num_warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
    }
    if "ptx" in kernel.asm:
        result["uneven_sums"] = uneven_sums(kernel.asm["ptx"])
    if "cubin" in kernel.asm and (NVIDIA_TOOLS / "nvdisasm").exists():
        result |= machine_code(kernel.asm["cubin"])
        wide = 16 // DTYPES[dtype].itemsize * result["unroll"]  # elements a thread and step
        for stores in (False, True):
            loop = bulk_loop(result, stores)
            key = "gradient_instructions" if stores else "statistics_instructions"
            result[key] = len(loop) / wide if loop else None
    return result


def machine_code(cubin: bytes) -> dict:
    """Registers, stack, and the loops of a kernel as opcode lists."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    opcodes, labels, jumps = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(opcodes)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);", line):
            if code[1].startswith("BRA") and (to := re.search(r"\.L_x_\d+", code[2])):
                jumps.append((len(opcodes), to[0]))
            opcodes.append(code[1])
    loops = [opcodes[labels[to] : at + 1] for at, to in jumps if labels.get(to, len(opcodes)) <= at]
    return {
        "registers": int(used["REG"]),
        "stack": int(used["STACK"]) + int(used["LOCAL"]),
        "opcodes": opcodes,
        "loops": loops,
    }


PTX = re.compile(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s+([^;]*);")
# what takes 64 bits apart, for lanes exchange 32, and puts them together
COPIES = ("mov.b", "cvt.u64.u32", "cvt.u32.u64", "shl.b64", "shr.u64", "or.b64")


def uneven_sums(ptx: str) -> list[str]:
    """The sums of two lanes into which a product is fused, or may be by the assembler.

    Each lane adds the other's value, rounded, to its own, which then is not: two lanes that should
    have the same sum differ in its last bit. What branches make of one value is not fused.
    """
    code = [(match[1], match[2]) for line in ptx.splitlines() if (match := PTX.match(line))]
    makers = {}
    for opcode, operands in code:
        made, *_ = operands.split("}" if operands.startswith("{") else ",", 1)
        for name in re.findall(r"%\w+", made):
            makers.setdefault(name, []).append((opcode, operands[len(made) :]))

    def is_from(name, kind, depth=4):
        """Whether it is made by an instruction of this kind, or a copy of what is."""
        return any(
            opcode.startswith(kind)
            or depth > 0
            and opcode.startswith(COPIES)
            and any(is_from(other, kind, depth - 1) for other in re.findall(r"%\w+", operands))
            for opcode, operands in makers.get(name, ())
        )

    found = []
    for opcode, operands in code:
        if re.match(r"(add|sub|fma)\..*f(32|64)$", opcode):
            _, *terms = re.findall(r"%\w+", operands)
            of_lanes = [is_from(term, "shfl") for term in terms]
            is_product = opcode.startswith("fma") or any(
                len(makers.get(term, ())) == 1 and is_from(term, "mul.f") for term in terms
            )
            if any(of_lanes) and is_product:
                found.append(f"{opcode} {operands}")
    return found


def _tool(name, *arguments):
    return subprocess.run(
        [NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def accesses(opcodes: list[str], kind: str | tuple[str, ...], wide: bool | None = None) -> list:
    """The loads or stores ("LDG", "STG", ...) among opcodes; only those of 16 bytes, or not."""
    found = [opcode for opcode in opcodes if opcode.startswith(kind)]
    return found if wide is None else [op for op in found if (".128" in op) == wide]


def bulk_loops(result: dict) -> list[list[str]]:
    """The loops that read a full step: one 16-byte load a tile, or more where weights come too."""
    return [
        loop for loop in result["loops"] if len(accesses(loop, "LDG", True)) >= result["unroll"]
    ]


def bulk_loop(result: dict, stores: bool) -> list[str] | None:
    """The loop over full steps, of the statistics or of the gradient; None if there is none."""
    loops = [loop for loop in bulk_loops(result) if bool(accesses(loop, "STG")) == stores]
    return max(loops, key=len) if loops else None  # a tail unrolled by as much is shorter


def binaries_by_batch(target: str) -> dict[str, int]:
    """For each kernel the largest number of binaries that batches of all sizes make of it."""
    compile_for(target)
    found = {}
    chosen = [Case(65, "bfloat16"), Case(50257, "bfloat16"), Case(65, "bfloat16", tangents=True)]
    for case in chosen:
        for batch in BATCHES:
            for name, kernel, constants in launched(launches(case, batch)):
                modes = ("GROUPED", "SKIP_ONE", "given")
                meant = " ".join(map(str, (name, case.vocab_size, *map(constants.get, modes))))
                found.setdefault(meant, set()).add(kernel.hash)
    return {meant: len(hashes) for meant, hashes in found.items()}


def launch_names(target: str, chosen: Iterator[Case]) -> list[dict[str, list[str]]]:
    """For each case the kernels that each function of launch.py launches; none is compiled."""
    compile_for(target)
    found = []
    for case in chosen:
        names, by_call = [], {}

        def name_only(self, *_, names=names, **__):
            names.append(self.jitted.__name__)

        with mock.patch.object(Kernel, "launch", name_only):
            for call in launches(case):
                by_call[call] = names[:]
                names.clear()
        found.append(by_call)
    return found


def table(results: Iterator[dict]) -> Iterator[str]:
    """Markdown, a line a binary."""
    yield (
        "| kernel | dtype | options | vocabulary | block | unroll | held | warps | registers "
        "| stack | shared | loads 16 B / other | stores 16 B / other | instructions an element: "
        "statistics | gradient |"
    )
    yield "|---" * 15 + "|"
    for r in results:
        counts = [
            " / ".join(str(len(accesses(r["opcodes"], kind, wide))) for wide in (True, False))
            if "opcodes" in r
            else ""
            for kind in ("LDG", "STG")
        ]
        numbers = [
            "" if r.get(key) is None else f"{r[key]:.2f}"
            for key in ("statistics_instructions", "gradient_instructions")
        ]
        cells = [r["kernel"], r["dtype"], r["options"], f"{r['vocab_size']:,}"]
        cells += [r[key] for key in ("block", "unroll", "held", "num_warps")]
        cells += [r.get("registers", ""), r.get("stack", ""), r["shared"], *counts, *numbers]
        yield "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all four")
    parser.add_argument("--options", choices=OPTIONS, action="append", help="default: plain")
    parser.add_argument("--cases", help="JSON list of cases instead of every variant")
    parser.add_argument("--binaries", action="store_true", help="count binaries a batch size")
    parser.add_argument("--launches", action="store_true", help="name what a call launches")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.binaries:
        print(json.dumps(binaries_by_batch(arguments.target)))
        return
    if arguments.cases:
        chosen = [Case(**case) for case in json.loads(arguments.cases)]
    else:
        chosen = (
            dataclasses.replace(case, options=options)
            for dtype in arguments.dtype or DTYPES
            for options in arguments.options or ["plain"]
            for case in cases(dtype, arguments.target)
        )
    if arguments.launches:
        print(json.dumps(launch_names(arguments.target, chosen)))
        return
    results = reports(arguments.target, chosen)
    if arguments.json:
        print(json.dumps(list(results)))
        return
    print(f"{arguments.target}, Triton {triton.__version__}\n")
    for line in table(results):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
