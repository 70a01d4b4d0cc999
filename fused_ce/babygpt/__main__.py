"""The command line: train, sample, eval and compare."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Annotated, Any

try:
    import tyro
except ModuleNotFoundError as error:
    sys.exit(f"error: BabyGPT needs {error.name}: pip install 'fused_ce[train]'")

from fused_ce.babygpt.checkpoint import config_from_plain, newest_checkpoint
from fused_ce.babygpt.compare import compare
from fused_ce.babygpt.config import CompareConfig, EvalConfig, SampleConfig, TrainConfig, preset
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.evaluate import evaluate
from fused_ce.babygpt.sample import sample
from fused_ce.babygpt.surroundings import prepare_process, say, warn
from fused_ce.babygpt.train import train

# What may differ when a run is continued; any other change would make it another run.
CHANGEABLE = {
    "data", "max_steps", "eval_interval", "eval_iters", "checkpoint_interval", "device", "out",
    "resume", "log_steps", "tensorboard", "vocab_parallel",
}  # fmt: skip
# torchrun sets them; the processes of a machine all meet the same mistakes.
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
PATIENCE_S = 10


@dataclass(frozen=True)
class _Start:
    """The flags that say where the defaults of the others come from."""

    preset: str | None = None
    out: Path | None = None
    resume: bool = False


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        prepare_process()
        status = _run(args)
        sys.stdout.flush()  # a reader that is gone shows here, not when Python exits
        return status
    except BrokenPipeError:  # whoever reads the output, `head` say, has seen enough
        with contextlib.suppress(OSError, ValueError):  # it may be no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        _report(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def _report(mistake: str) -> None:
    """Print one line for all processes of a machine, where they fail alike.

    When the first has said it and is gone, torchrun ends the others in their sleep.
    """
    if LOCAL_RANK:
        time.sleep(PATIENCE_S)
    process = f"process {RANK}: " if RANK else ""
    say(f"error: {process}{mistake}")


def _parse(*args: Any, **kwargs: Any) -> Any:
    """Call tyro; a flag that cannot be read is one line, as every other mistake."""
    kwargs["config"] = (tyro.conf.FlagCreatePairsOff,)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(*args, **kwargs)
    except SystemExit as stop:
        if stop.code:
            _report(_complaint(errors.getvalue()) + " (see --help)")
        raise


def _complaint(box: str) -> str:
    """Return what is wrong from tyro's box, which has a title, what is wrong, a rule, and advice.

    A terminal that lacks the characters of a frame gets rules of hyphens above and below.
    """

    def is_rule(line: str) -> bool:
        return bool(line) and set(line) <= set("─-╭╮╰╯")

    lines = (line.strip("│ ") for line in box.splitlines()[1:])
    said = takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines))
    return " ".join(said).strip().rstrip(".")


def _given(args: list[str], flag: str) -> list[str]:
    """Return the values of a flag as they are typed.

    What tyro makes of them does not tell "" from the current folder, or the text None from nothing.
    """
    return [
        *(value for word, value in zip(args, args[1:], strict=False) if word == flag),
        *(word.removeprefix(f"{flag}=") for word in args if word.startswith(f"{flag}=")),
    ]


def _run(args: list[str]) -> int:
    for flag in ("--out", "--checkpoint", "--data"):
        if any(not value.strip() for value in _given(args, flag)):
            raise UserError(f"{flag} is empty: is a variable of the shell not set?")
    defaults, saved, compared = TrainConfig(), None, CompareConfig()
    if args[:1] == ["train"]:
        defaults, saved = _train_defaults(args[1:])
        args = _without_repeated(args, defaults)
    elif args[:1] == ["compare"]:
        compared = CompareConfig(**vars(preset(_start(args[1:]).preset or "quick")))
    command = _parse(
        Annotated[TrainConfig, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[SampleConfig, tyro.conf.subcommand("sample")]
        | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
        | Annotated[CompareConfig, tyro.conf.subcommand("compare", default=compared)],
        args=args,
        prog="babygpt",
        description="BabyGPT: a small GPT that trains on the project's own cross-entropy.",
    )
    if isinstance(command, SampleConfig):
        if command.stop is None and _given(args, "--stop"):
            command = replace(command, stop=_given(args, "--stop")[-1])
        sample(command)
    elif isinstance(command, EvalConfig):
        evaluate(command)
    elif isinstance(command, CompareConfig):
        return 0 if compare(command) else 1
    else:
        _refuse_changes(command, defaults, saved)
        return 0 if train(command, saved) else 130
    return 0


def _start(args: list[str]) -> _Start:
    start, _ = _parse(_Start, args=args, return_unknown_args=True, add_help=False)
    return start


def _train_defaults(args: list[str]) -> tuple[TrainConfig, dict[str, Any] | None]:
    """Return the preset's settings, or with --resume those of the run, and its checkpoint."""
    start = _start(args)
    if not start.resume or {"-h", "--help"} & set(args):
        return preset(start.preset or "quick"), None
    folder = start.out or preset(start.preset or "quick").folder
    saved, problems = newest_checkpoint(folder)
    for problem in problems if RANK == 0 else ():
        warn(f"{problem}; continuing from step {saved['step']}")
    return config_from_plain(saved["config"], folder), saved


def _without_repeated(args: list[str], defaults: TrainConfig) -> list[str]:
    """Leave out the switches that the run has on already: tyro only knows how to turn them off."""
    on = {name for name, value in vars(defaults).items() if value is True}
    return [word for word in args if word[:2] != "--" or word[2:].replace("-", "_") not in on]


def _refuse_changes(config: TrainConfig, defaults: TrainConfig, saved: dict | None) -> None:
    """Raise UserError if a run would continue with settings that it did not begin with."""
    if saved is None:
        return
    for field in fields(config):
        before, now = getattr(defaults, field.name), getattr(config, field.name)
        if field.name not in CHANGEABLE and before != now:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag} cannot change with --resume: the run has {before}, got {now}")


if __name__ == "__main__":
    sys.exit(main())
