"""Every command and option that click knows of, for tests that leave none out."""

from collections.abc import Iterator

import click

from kvfold.cli.main import cli


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
