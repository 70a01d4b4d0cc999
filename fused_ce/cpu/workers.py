"""Blocks of rows on threads that compute alone, so that nobody waits before the last block is done.

An operation of PyTorch is a parallel loop, at whose end every core waits for the slowest. A block
takes ten of them and a loss hundreds, and where another process has a core each may cost a time
slice of it. Here each thread takes the next block and works on it by itself: its own operations
start no loop. PyTorch lets go of Python's lock inside of them.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Block = TypeVar("Block")


class Job:
    """Blocks, handed out one by one to threads, and whether all of these are done."""

    def __init__(
        self, blocks: Sequence[Block], worker: Callable[[], Callable[[Block], None]], n_threads: int
    ):
        """`worker` makes what a thread calls for each of its blocks."""
        self.blocks, self.worker = blocks, worker
        self.n_taken = 0
        self.is_stopped = False
        self.error: BaseException | None = None
        self.n_busy, self.lock, self.done = n_threads, threading.Lock(), threading.Lock()
        self.done.acquire()
        self.is_inference = torch.is_inference_mode_enabled()

    def work(self) -> None:
        """Until no block is left, or somebody has failed: an error is the caller's."""
        try:
            self._work()
        except BaseException as raised:
            self.is_stopped, self.error = True, raised
        with self.lock:
            self.n_busy -= 1
            if self.n_busy == 0:
                # Tensors die before the caller goes on: should the interpreter end meanwhile, a
                # thread that comes back from PyTorch's code ends the process by an abort.
                del self.blocks, self.worker
                self.done.release()

    def _work(self) -> None:
        with torch.inference_mode(self.is_inference), torch.no_grad():
            compute = self.worker()
            while not self.is_stopped and (number := self._take()) < len(self.blocks):
                compute(self.blocks[number])

    def _take(self) -> int:
        """The number of the next block: nobody gets it twice, the interpreter's lock or no."""
        with self.lock:
            self.n_taken += 1
            return self.n_taken - 1


class Pool:
    """Threads that wait for jobs; as many as the largest job has asked for."""

    def __init__(self):
        """Without a thread."""
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.n_threads, self.lock = 0, threading.Lock()

    def run(self, job: Job, n_threads: int) -> None:
        """The job, on as many threads; those of other callers may be before it in the queue.

        What interrupts it, Ctrl-C say, is raised when no thread writes any more. It may come
        between any two instructions, so what is counted here is right or too low: a thread too many
        finds nothing to do.
        """
        n_called, interrupt = 0, None
        while n_called < n_threads or job.n_busy > 0:
            try:
                while n_called < n_threads:
                    self.jobs.put(job)
                    n_called += 1
                if job.n_busy > 0:
                    job.done.acquire()
            except BaseException as raised:
                job.is_stopped, interrupt = True, raised
        error, job.error = interrupt or job.error, None
        if error is not None:
            try:
                raise error
            finally:  # its traceback leads here: a circle, which would hold the rows until a gc
                del error, interrupt

    def grown(self, n_threads: int) -> int:
        """How many threads stand, of so many: fewer where the system lets nobody start more."""
        if self.n_threads < n_threads:
            with self.lock:
                self._grow(n_threads)
        return min(self.n_threads, n_threads)

    def _grow(self, n_threads: int) -> None:
        standing, n_new = threading.Semaphore(0), 0
        with contextlib.suppress(RuntimeError):  # can't start new thread
            for _ in range(n_threads - self.n_threads):
                threading.Thread(
                    target=self._serve, args=(standing,), name="fused_ce", daemon=True
                ).start()
                n_new += 1
        for _ in range(n_new):
            standing.acquire()
        if n_new > 0:
            # Theirs was also made the number that threads to come begin with.
            torch.set_num_threads(torch.get_num_threads())
            self.n_threads += n_new

    def _serve(self, standing: threading.Semaphore) -> None:
        torch.get_num_threads()  # a thread's first look sets its number to everybody's
        torch.set_num_threads(1)
        _this_thread.is_worker = True
        standing.release()
        while True:
            self.jobs.get().work()


def share(
    blocks: Sequence[Block], worker: Callable[[], Callable[[Block], None]], in_turn: bool = False
) -> None:
    """Call for every block what `worker()` returns, once a thread; the order is anybody's guess.

    On as many threads as PyTorch uses in the one that calls. One block, one core, blocks to be
    computed `in_turn`, and calls from a thread of the pool are computed where they are.
    """
    in_turn = in_turn and not _is_forked  # OpenMP's threads are gone too, and its loops would wait
    n_threads = 1 if in_turn else min(torch.get_num_threads(), len(blocks))
    if n_threads > 1 and not getattr(_this_thread, "is_worker", False):
        n_threads = _pool.grown(n_threads)
    else:
        n_threads = 0
    if n_threads > 0:
        _pool.run(Job(blocks, worker, n_threads), n_threads)
        return
    compute = worker()
    for block in blocks:
        compute(block)


def _begin_in_child() -> None:
    global _pool, _is_forked
    _pool, _is_forked = Pool(), True


_this_thread = threading.local()
_pool, _is_forked = Pool(), False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)  # threads do not survive a fork
