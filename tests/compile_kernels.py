"""Compile what the launchers launch for one GPU target, without a GPU; print a report as JSON.

Run by test_codegen.py in a process of its own, as TRITON_INTERPRET must be off:
`python compile_kernels.py cuda 90 32 kernels` (or `binaries`).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fused_ce.kernels import launch
from fused_ce.options import LossOptions
from fused_ce.rows import empty_gradient

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Each has a reason to compile to something else: (vocab_size, dtype, all options, misaligned by).
CASES = {
    "gpt2-bf16": (50257, torch.bfloat16, False, 0),
    "gpt2-f32": (50257, torch.float32, False, 0),
    "llama-bf16": (128256, torch.bfloat16, False, 0),
    "misaligned-bf16": (50257, torch.bfloat16, False, 3),
    "all-options-bf16": (50257, torch.bfloat16, True, 0),
    "tiny-bf16": (65, torch.bfloat16, False, 0),
    "tiny-all-options-f32": (1000, torch.float32, True, 0),
}
OTHER_TARGETS = ("gpt2-bf16", "tiny-bf16")  # one of each family
BATCHES = ((1, 1), (1, 2), (16, 1), (1, 16), (3, 5))  # 1 and multiples of 16 tempt Triton


class CompileOnly:
    """A driver that knows its target and has no device."""

    def __init__(self, target):
        """Compile for `target`."""
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def launched(function):
    """The kernels that a call would launch, compiled: [(name, CompiledKernel, constants)]."""
    kernels, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((self.__name__, kernel, kwargs))
        return kernel

    JITFunction.run = record
    try:
        function()
    finally:
        JITFunction.run = run
    return kernels


def launches(vocab_size, dtype, all_options, offset, batch=(1, 2)):
    """Call every function of launch.py once, as autograd.py does."""
    storage = torch.zeros(batch[0] * batch[1] * vocab_size + offset, dtype=dtype)
    logits = storage[offset:].view(*batch, vocab_size)
    targets = torch.zeros(batch, dtype=torch.long)
    weight = torch.ones(vocab_size) if all_options else None
    options = LossOptions(reduction="mean", label_smoothing=0.1 if all_options else 0.0)
    gradient, one = empty_gradient(logits), torch.ones(())
    loss, *stats = launch.forward(logits, targets, weight, options)
    launch.forward_with_grad(logits, targets, weight, options, gradient)
    launch.backward(one, logits, targets, weight, tuple(stats), options, gradient)
    launch.scale(gradient, one, gradient)


def report(name, kernel, constants, dtype):
    wide = 16 // dtype.itemsize * constants.get("UNROLL", 1)  # elements a thread and step
    result = {
        "kernel": name,
        "elements_a_step": wide,
        "unroll": constants.get("UNROLL", 1),
        "num_warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
    }
    if "cubin" in kernel.asm:
        result |= machine_code(kernel.asm["cubin"])
    return result


def machine_code(cubin):
    """Registers, stack, and the loops of a kernel as opcode lists."""
    if not (NVIDIA_TOOLS / "nvdisasm").exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = tool("nvdisasm", "-c", file.name)
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
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


def tool(name, *arguments):
    return subprocess.run(
        [NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def binaries_by_batch():
    """For each kernel family the number of binaries that batches of all sizes make of a kernel."""
    counts = {}
    for family, vocab_size in (("stream", 50257), ("tiny", 65)):
        found = {}
        for batch in BATCHES:
            for name, kernel, constants in launched(
                lambda batch=batch, v=vocab_size: launches(v, torch.bfloat16, False, 0, batch)
            ):
                meant = (
                    name,
                    *(constants.get(key) for key in ("GROUPED", "SKIP_ONE", "LOSS", "GRAD")),
                )
                found.setdefault(meant, set()).add(kernel.hash)
        counts[family] = {" ".join(map(str, meant)): len(hashes) for meant, hashes in found.items()}
    return counts


def main():
    backend, arch, warp_size, what = sys.argv[1:5]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    triton.runtime.driver.set_active(CompileOnly(target))
    launch._warp_size = lambda device: int(warp_size)
    if what == "binaries":
        print(json.dumps(binaries_by_batch()))
        return
    cases = CASES if arch == "90" else {name: CASES[name] for name in OTHER_TARGETS}
    reports = [
        {"case": case} | report(name, kernel, constants, arguments[1])
        for case, arguments in cases.items()
        for name, kernel, constants in launched(lambda arguments=arguments: launches(*arguments))
    ]
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
