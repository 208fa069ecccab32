"""Every command and option that click knows of, how a command complains, and what it imports."""

import subprocess
import sys
from collections.abc import Iterator

import click

from kvfold.cli.main import cli
from tests.conftest import Run


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, groups' own included."""
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        yield (*path, name)
        if isinstance(found, click.Group):
            yield from commands(found, (*path, name))


def command_of(words: tuple[str, ...]) -> click.Command:
    """The command that words name."""
    found: click.Command | None = cli
    for word in words:
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), word)
    assert found is not None
    return found


def options() -> list[tuple[tuple[str, ...], click.Option]]:
    """Every option of every command."""
    return [
        (words, param)
        for words in commands()
        for param in command_of(words).params
        if isinstance(param, click.Option)
    ]


def complaint(run: Run, *words: str) -> None:
    """Check exit code and form: an error line, a hint line, no traceback, no output."""
    assert run.code == 2, run.err
    lines = run.err.strip().splitlines()
    assert len(lines) == 2, run.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert run.out == ""
    for word in words:
        assert word in run.err, run.err


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines())
