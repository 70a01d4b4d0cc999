"""Tests that run in several processes of one group, one body for all of them.

The processes live as long as the tests that use them: each imports torch once. What a test body
raises in any of them fails the test; processes that then wait for each other are replaced.
"""

import functools
import importlib
import inspect
import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from multiprocessing import connection
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from devices import (
    CUDA,
    INTERPRETED,
    entered,
    fill_uninitialised_memory,
    patch_the_language_once,
)
from oracle import SEED

import fused_ce

DEADLINE_S = 60  # of a body; exchanges give up before, so that all say where they were
GRACE_S = 3  # for the others, where one has failed
BACKENDS = ("cpu", "triton", CUDA)


class Here(NamedTuple):
    """What a body knows of where it runs."""

    rank: int
    n_ranks: int
    device: str
    on_host: bool  # whether the implementation reads the targets before it computes


class Ranks:
    """Processes 0, 1, ... of a group, waiting for bodies to run."""

    def __init__(self, n_ranks, kind, folder):
        """Start them; `kind` is gloo or nccl."""
        context = multiprocessing.get_context("spawn")
        store = f"file://{folder}/{kind}-{n_ranks}-{time.monotonic_ns()}"
        self.processes, self.pipes = [], []
        for rank in range(n_ranks):
            ours, theirs = context.Pipe()
            args = rank, n_ranks, kind, store, theirs
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, module, name, backend, arguments):
        """Return what each rank says: None, its traceback, or that it did not answer."""
        said = {}
        for pipe in self.pipes:
            pipe.send((module, name, backend, arguments))
        deadline = time.monotonic() + DEADLINE_S
        while len(said) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in said]
            ready = connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionError):
                    answer = "the process has ended"
                said[self.pipes.index(pipe)] = answer
                if answer is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return [said.get(rank, "no answer") for rank in range(len(self.pipes))]

    def end(self):
        """They end when nobody holds the other end of their pipe, or are made to."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank, n_ranks, kind, store, pipe):
    """The life of a process."""
    torch.set_num_threads(1)
    if INTERPRETED:
        patch_the_language_once()
    if kind == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        kind, store, rank=rank, world_size=n_ranks, timeout=timedelta(seconds=DEADLINE_S - 10)
    )
    while True:
        try:
            module, name, backend, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            os._exit(0)  # without farewells to processes that may be gone
        device = f"cuda:{rank}" if backend == "cuda" else "cpu"
        here = Here(rank, n_ranks, device, backend == "cpu")
        try:
            torch.manual_seed(SEED)
            fused_ce.exchange._sizes_of.clear()
            body = getattr(importlib.import_module(module), name).body
            with pytest.MonkeyPatch.context() as patch:
                fill_uninitialised_memory(patch)
                with fused_ce.backend("auto" if backend == "cuda" else backend):
                    body(here, **arguments)
            answer = None
        except BaseException:
            answer = traceback.format_exc()
        pipe.send(answer)


class Pool:
    """The processes of a session, by their number and the library they talk by."""

    def __init__(self, folder):
        """None yet; they meet in a file of `folder`."""
        self.folder, self.of = folder, {}

    def check(self, n_ranks, kind, *call):
        """Fail where any rank does."""
        if (n_ranks, kind) not in self.of:
            self.of[n_ranks, kind] = Ranks(n_ranks, kind, self.folder)
        said = self.of[n_ranks, kind].run(*call)
        if any(answer in ("no answer", "the process has ended") for answer in said):
            self.of.pop((n_ranks, kind)).end()
        wrong = {}
        for rank, answer in enumerate(said):
            if answer is not None:
                wrong.setdefault(answer, []).append(rank)
        if wrong:
            text = "\n".join(f"ranks {who}: {answer}" for answer, who in wrong.items())
            pytest.fail(text, pytrace=False)

    def end(self):
        """Of the session."""
        for ranks in self.of.values():
            ranks.end()


def on_ranks(*numbers, backends=BACKENDS):
    """Make a test of a body(here, **arguments) that every rank of a group runs."""

    def made(body):
        @pytest.mark.parametrize("backend", backends)
        @pytest.mark.parametrize("n_ranks", numbers, ids="{}-ranks".format)
        @functools.wraps(body)
        def test(pool, n_ranks, backend, **arguments):
            with entered(backend):
                if backend == "cuda" and torch.cuda.device_count() < n_ranks:
                    pytest.skip(f"needs {n_ranks} GPUs")
                kind = "nccl" if backend == "cuda" else "gloo"
                pool.check(n_ranks, kind, body.__module__, body.__name__, backend, arguments)

        _, *others = inspect.signature(body).parameters.values()
        own = ("pool", "n_ranks", "backend")
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
        test.__signature__ = inspect.Signature(
            [*(inspect.Parameter(name, kinds) for name in own), *others]
        )
        test.body = body
        return test

    return made
