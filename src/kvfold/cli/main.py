"""Entry point: the list of commands, and the one place where errors become words."""

import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

import kvfold
from kvfold.cli.leave import INTERRUPTED, ignore_signals, leave_at_once
from kvfold.cli.signals import Interrupted, interruptible
from kvfold.errors import KVFoldError
from kvfold.names import printable, shown

_LONGEST = 500  # characters of a message
_SYSTEM_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "give a path that you may open",
    errno.EPERM: "give a path that you may open",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "allow more open files: ulimit -n",
}

_TIMED = {"bench", "plan", "doctor"}  # what they measure is to be as it is elsewhere

# name -> one line of help. The module kvfold.cli.<name> is imported only to run it.
COMMANDS = {
    "demo": "Train, fold and measure a small model on this machine (two to six minutes).",
    "inspect": "Show a checkpoint's heads, KV cache size and how alike its heads are.",
    "convert": "Fold a checkpoint to fewer KV heads.",
    "heal": "Train a folded checkpoint towards its source.",
    "eval": "Compare folded checkpoints with their source on text.",
    "plan": "Predict memory and speed on a machine, by KV heads and cache format.",
    "bench": "Measure attention and whole models against the machine and other ways.",
    "verify": "Check that other engines give the same tokens for a checkpoint.",
    "look": "Draw which tokens each head looks at, source beside folded.",
    "report": "Put everything measured about runs into one HTML file.",
    "methods": "List the folding methods.",
    "families": "List the architectures that can be folded, and those that cannot.",
    "doctor": "Check this installation and machine.",
}


class _Commands(click.Group):
    """Loads a command's module when it is used; suggests the nearest name for a typo."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"kvfold.cli.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        with interruptible():
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command: {args[0]}\nhint: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, but from the table above: importing every command takes too long."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(kvfold.__version__, prog_name="kvfold")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Fold a transformer's key/value heads, and prove what it kept.

    Results go to stdout (add --json for one JSON document); progress and messages to stderr.
    Exit codes: 0 success, 1 failed while running, 2 bad input, 3 a threshold was not met,
    130 interrupted (Ctrl-C or SIGTERM).
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    _quiet_libraries(debug)
    _share_processors(arguments)
    try:
        result = cli.main([a for a in arguments if a != "--debug"], standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KVFoldError as error:
        return _complain(error.message, error.hint, error.exit_code, debug)
    except click.exceptions.NoArgsIsHelpError as error:  # a command group without a command
        click.echo(error.ctx.get_help() if error.ctx else "")
        return 2
    except click.ClickException as error:
        message, _, hint = error.format_message().partition("\nhint: ")
        name = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        hint = hint or f"`{name or 'kvfold'} --help` shows what can be given"
        return _complain(message, hint, 2, debug)
    except (Interrupted, KeyboardInterrupt, click.exceptions.Abort) as error:
        hint = getattr(error, "hint", "")
        return _complain("interrupted; nothing was overwritten", hint, INTERRUPTED, debug)
    except BrokenPipeError:  # the reader of our output went away
        _drop_output()
        return 1
    except OSError as error:
        return _complain(*_of_the_system(error), 1, debug)
    except Exception as error:
        from kvfold.quality.device import is_out_of_memory

        if is_out_of_memory(error):
            return _complain("out of memory", "fewer tokens at once need less", 1, debug)
        first_line = (str(error).strip().splitlines() or [""])[0]
        message = f"unexpected {type(error).__name__}: {first_line}"
        return _complain(message, "this is a bug; --debug shows where", 1, debug)


def _complain(message: str, hint: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"error: {_line(message)}", err=True)
    if hint:
        click.echo(f"hint: {_line(hint)}", err=True)
    return code


def _of_the_system(error: OSError) -> tuple[str, str]:
    """What the system refused, and what may be done about it."""
    where = f"{shown(os.fsdecode(error.filename))}: " if error.filename else ""
    hint = _SYSTEM_HINTS.get(error.errno or 0, "--debug shows where")
    return f"{where}{error.strerror or error}", hint


def _line(words: str) -> str:
    """On one line, with nothing that a terminal would obey."""
    line = printable(" ".join(words.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 40]} … {line[-37:]}"


def _quiet_libraries(debug: bool) -> None:
    """Keep other libraries' progress bars and advice out of our output."""
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _share_processors(arguments: Sequence[str]) -> None:
    """Let threads that wait for one another sleep early, before PyTorch reads how they should.

    GNU OpenMP, which PyTorch's own builds use, spins 300,000 times by default: some ten
    milliseconds in which nothing else can run, so that beside other work a step of the fit took
    twenty to forty times as long. So many times cost a twentieth on an idle machine.
    """
    command = next((each for each in arguments if not each.startswith("-")), None)
    if command not in _TIMED and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def run() -> None:
    """Run the command line and exit with its code."""
    leave_at_once()
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 1
        _drop_output()
    except OSError as error:
        code = _complain(*_of_the_system(error), 1, debug=False)
        _drop_output()
    ignore_signals()  # all is done: tearing libraries down is not to be interrupted
    # Where exec of a string was interrupted (dataclasses use it), Python would end by the signal
    # itself in place of the code; another exec makes it forget that.
    exec("")
    sys.exit(code)


def _drop_output() -> None:
    """What is still to be written goes nowhere, instead of failing once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
