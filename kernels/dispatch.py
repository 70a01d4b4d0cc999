"""Kernels that launch without Triton's own dispatch once they are compiled.

`kernel[grid](...)` looks at every argument again to find its specialisation, which is most of what
a small loss costs. These kernels specialise on no number and on no alignment, so that dtypes and
constants alone tell which binary is meant.
"""

import inspect

import triton
import triton.language as tl


class Kernel:
    """A `@triton.jit` function whose arguments are tensors, then numbers, then constants.

    Numbers are those with a type as annotation.
    """

    def __init__(self, function):
        """Made by the decorator `@kernel`; nothing is compiled yet."""
        parameters = inspect.signature(function).parameters.values()
        given = [p for p in parameters if p.annotation is not tl.constexpr]
        self.jitted = triton.jit(
            function,
            do_not_specialize=[p.name for p in given if p.annotation is not p.empty],
            do_not_specialize_on_alignment=[p.name for p in given if p.annotation is p.empty],
        )
        self.constants = [p.name for p in parameters if p.annotation is tl.constexpr]
        self.compiled = {}

    def launch(self, grid, tensors, numbers, num_warps, **constants):
        """Launch (x, y) programs on the current device; constants by name, always in one order."""
        dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        key = (tensors[0].device, num_warps, *dtypes, *constants.values())
        found = self.compiled.get(key)
        if found is not None:
            compiled, values = found
            compiled[(*grid, 1)](*tensors, *numbers, *values)
            return
        compiled = self.jitted[grid](*tensors, *numbers, **constants, num_warps=num_warps)
        if isinstance(compiled, triton.compiler.CompiledKernel):  # the interpreter has none
            self.compiled[key] = compiled, tuple(constants[name] for name in self.constants)


kernel = Kernel
