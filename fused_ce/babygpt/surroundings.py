"""What a run may find missing or changed around it, and how it ends all the same."""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fused_ce.babygpt.config import TrainConfig
from fused_ce.babygpt.errors import UserError


def prepare_process() -> None:
    """Give a program of ours what it may lack: standard streams for any character, and a home."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the program: `>&-`
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # not a StringIO
            stream.reconfigure(errors="backslashreplace")  # it may lack a model's characters
    try:
        Path.home()
    except RuntimeError:  # no HOME, and a user without an entry in passwd, as in containers
        os.environ["HOME"] = home = _temporary_home()
        if not os.environ.get("FUSED_CE_CACHE"):
            warn(f"there is no home folder: caches go to {home}, or to FUSED_CE_CACHE if it is set")


def _temporary_home() -> str:
    """Return a folder that nobody else can have prepared, the same the next time if possible."""
    home = Path(tempfile.gettempdir()) / f"fused-ce-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    status = home.lstat()
    if home.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return tempfile.mkdtemp(prefix="fused-ce-")
    return str(home)


def say(text: str) -> None:
    """Print a line on stderr if there is one: what it says is not worth an error."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError, RuntimeError):  # gone, closed, or in the midst of a line
            print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a line that does not end anything."""
    say(f"warning: {text}")


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """Go on with a warning if this fails, whatever the reason: the run does not depend on it."""
    try:
        yield
    except (UserError, BrokenPipeError):  # those say enough, or have nobody to say it to
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        warn(f"{what}: {type(error).__name__}: {reason}")


@contextmanager
def interruptible(stop: Callable[[], bool]) -> Iterator[None]:
    """Let Ctrl-C call `stop`, so that a step is never cut in two; a second one stops at once.

    Python hears Ctrl-C in the main thread alone: in another one the run cannot be interrupted.

    Args:
        stop: tells the run to stop and returns whether it is told for the first time.
    """

    def handle(signum, frame):
        if not stop():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        # None is a handler that Python did not set
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


@contextmanager
def numerics(config: TrainConfig) -> Iterator[None]:
    """Set PyTorch's global switches as a run asks for them, and put them back."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Say what a user can do about the errors that PyTorch raises for lack of something."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"the GPU has too little memory for --batch-size {config.batch_size}: a smaller one "
            "with more --grad-accum makes the same step"
        ) from None
    except RuntimeError as error:
        first, module = (str(error).splitlines() or [""])[0], type(error).__module__
        if "Failed to find C compiler" in first:
            raise UserError("Triton needs a C compiler (gcc, say), and there is none") from error
        if not (config.compile or config.loss == "compiled") or not module.startswith(
            ("torch._dynamo", "torch._inductor")
        ):
            raise
        flag = "--compile" if config.compile else "--loss compiled"
        if "InvalidCxxCompiler" in first:
            raise UserError(f"{flag} needs a C++ compiler (g++, say), and there is none") from error
        raise UserError(f"{flag} failed: {first}") from error
