"""The ceiling of a loss from hidden states: its three matrix products, and nothing else."""

import torch

from benchmarks.cases import DTYPES
from benchmarks.inputs import IGNORE_INDEX, LinearInputs
from fused_ce.cpu import machine
from fused_ce.linear_chunks import padded, rows_at_once


class Products:
    """The products that fused_ce makes, of its chunks, dtypes and strides.

    A call is logits = hidden @ weight.T, hidden's gradient = buffer @ weight and weight's
    gradient += buffer.T @ hidden for every chunk, the buffer being what the logits went into. As
    `clone` it pays for fresh memory of what it returns, and not for the buffer, nor for copies of
    operands: where a CPU has no products of 16 bits, all three are of float32.
    """

    def __init__(self, inputs: LinearInputs):
        """Of the rows that fused_ce multiplies: on a CPU those that are not ignored."""
        case = inputs.case
        hidden, self.weight, targets = inputs.first
        self.on_cpu = hidden.device.type == "cpu"
        self.hidden = hidden[targets != IGNORE_INDEX] if self.on_cpu else hidden
        self.n_rows = self.hidden.shape[0]
        dtype = DTYPES[case.dtype]
        kind = hidden.device.type
        self.chunk_size = rows_at_once(self.n_rows, case.vocab_size, dtype, kind)
        if self.on_cpu and dtype.itemsize == 2 and not machine.multiplies(dtype):
            dtype = torch.float32
            self.hidden, self.weight = self.hidden.to(dtype), self.weight.to(dtype)
        stride = case.vocab_size if self.on_cpu else padded(case.vocab_size)
        buffer = self.hidden.new_empty(self.chunk_size, stride)
        self.buffer = buffer[:, : case.vocab_size]
        # 16 bits are summed over chunks in 32, for which a CPU's product wants operands of 32.
        self.sum_dtype = torch.float32 if self.chunk_size < self.n_rows else dtype
        self.operands = self.buffer, self.hidden
        self.out_dtype = {}
        if self.sum_dtype != dtype and self.on_cpu:
            wide = torch.zeros(self.buffer.shape, dtype=self.sum_dtype)
            self.operands = wide, self.hidden.to(self.sum_dtype)
        elif self.sum_dtype != dtype:
            self.out_dtype = {"out_dtype": self.sum_dtype}

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Three products a chunk."""
        grad_hidden = torch.empty_like(self.hidden)
        grad_weight = self.weight.new_empty(self.weight.shape, dtype=self.sum_dtype)
        for start in range(0, self.n_rows, self.chunk_size):
            part = slice(start, min(start + self.chunk_size, self.n_rows))
            count = part.stop - start
            logits = self.buffer[:count]
            torch.mm(self.hidden[part], self.weight.T, out=logits)
            torch.mm(logits, self.weight, out=grad_hidden[part])
            grad, hidden = self.operands[0][:count].T, self.operands[1][part]
            if start == 0:
                torch.mm(grad, hidden, out=grad_weight, **self.out_dtype)
            else:
                torch.addmm(grad_weight, grad, hidden, out=grad_weight, **self.out_dtype)
        return grad_hidden, grad_weight
