"""What a request is made of: each option declared once, and checked when it is given. No torch.

A request is a frozen dataclass whose fields are made by :func:`option`. Calls from Python, the
command line (``cli.parse``) and the command that repeats a run (``record``) are views of them.
"""

from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Protocol, Self

from kvfold import arguments
from kvfold.errors import InputError
from kvfold.numbers import nothing, parts


class Kind(Protocol):
    """A kind of value: ``kvfold.numbers`` has those of numbers, this module the others."""

    def check(self, value: object, name: str) -> Any:
        """The value as it is kept; an ``InputError`` that names the option for a wrong one."""

    def written(self, value: Any) -> str:
        """The words that give a value on a command line."""


@dataclass(frozen=True)
class Text:
    """Words, checked by a function."""

    test: Callable[[object, str], str] = arguments.text

    def check(self, value: object, name: str) -> str:
        """What the function says they are."""
        return self.test(value, name)

    def written(self, value: str) -> str:
        """The words."""
        return value


DEVICE = Text(lambda value, name: str(value))  # tried only where it is needed: that needs torch


@dataclass(frozen=True)
class Made:
    """Something made of a value of another kind.

    Attributes:
        type: of what is made; one that is made already is let be. parts: the value it was made of.
    """

    of: Kind
    type: type
    make: Callable[[Any], Any]
    parts: Callable[[Any], Any]

    def check(self, value: object, name: str) -> Any:
        """What is made of the value."""
        return value if isinstance(value, self.type) else self.make(self.of.check(value, name))

    def written(self, value: Any) -> str:
        """The words that give the value it was made of."""
        return self.of.written(self.parts(value))


@dataclass(frozen=True)
class Choice:
    """One of the names that are known."""

    known: Collection[str]

    def check(self, value: object, name: str) -> str:
        """The name."""
        return arguments.choice(value, name, self.known)

    def written(self, value: str) -> str:
        """The name."""
        return value


@dataclass(frozen=True)
class Place:
    """The path of a file or folder, kept as a string."""

    def check(self, value: object, name: str) -> str:
        """The path, ``~`` expanded."""
        return str(arguments.location(value, name))

    def written(self, value: str) -> str:
        """The path."""
        return value


@dataclass(frozen=True)
class Model:
    """A model: a folder, a hub name or a file."""

    def check(self, value: object, name: str) -> str:
        """The words as they were given."""
        return arguments.source(value, name)

    def written(self, value: str) -> str:
        """The words."""
        return value


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def check(self, value: object, name: str) -> bool:
        """The value itself."""
        return arguments.flag(value, name)

    def written(self, value: bool) -> str:
        """Nothing: a flag is given by its name alone."""
        return ""


@dataclass(frozen=True)
class Several:
    """Values of a kind; on a command line each with the option's name before it."""

    each: Kind

    def check(self, values: object, name: str) -> tuple[Any, ...]:
        """The values of a sequence."""
        return arguments.several(values, name, self.each.check)

    def written(self, values: Collection[Any]) -> str:
        """The values in a line, for messages: a command gives them one by one."""
        return " ".join(map(self.each.written, values))


@dataclass(frozen=True)
class Listed:
    """Values of a kind, each once; on a command line with commas between.

    Attributes:
        none: whether the word ``none`` gives no values at all.
    """

    each: Kind
    none: bool = False

    def check(self, values: object, name: str) -> tuple[Any, ...]:
        """The values of a sequence."""
        found = tuple(dict.fromkeys(arguments.several(values, name, self.each.check)))
        if not found and not self.none:
            raise nothing(name)
        return found

    def read(self, text: str, name: str) -> tuple[Any, ...]:
        """The values between a text's commas."""
        if self.none and text.strip() == "none":
            return ()
        read = getattr(self.each, "read", None)  # of numbers
        values = parts(text, name)
        return self.check([read(value, name) for value in values] if read else values, name)

    def written(self, values: Collection[Any]) -> str:
        """The values with commas between."""
        return ",".join(map(self.each.written, values)) or "none"


@dataclass(frozen=True)
class Switch:
    """A flag that stands for one value of an option which no words can give.

    Attributes:
        what: the option's values, in a message.
    """

    name: str
    value: object
    what: str
    help: str = ""

    def choose(self, given: Any, off: bool) -> Any:
        """What was asked for: the values given, or this one.

        Raises:
            InputError: for both.
        """
        if off and given:
            raise InputError(f"{self.what} and {self.name} exclude each other", "drop one")
        return self.value if off else given


@dataclass(frozen=True)
class Option:
    """One thing that a request says.

    Attributes:
        name: as it is typed and as messages call it: ``--context``, or ``SRC`` for an argument.
        default: ``MISSING`` for what must be given; None for what is worked out from the rest.
        metavar: stands for the value in ``--help``, in place of what the kind says.
        off: another flag, for a value that no words can give.
    """

    name: str
    kind: Kind
    default: Any
    help: str = ""
    metavar: str | None = None
    off: Switch | None = None

    @property
    def is_argument(self) -> bool:
        """Whether it is told by its place rather than by a name."""
        return not self.name.startswith("-")

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    def check(self, value: object) -> Any:
        """The value as it is kept.

        Raises:
            InputError: for a wrong one.
        """
        none = self.default is None or (self.off is not None and self.off.value is None)
        return None if value is None and none else self.kind.check(value, self.name)


def option(
    name: str,
    kind: Kind,
    default: Any = MISSING,
    help: str = "",
    *,
    metavar: str | None = None,
    off: Switch | None = None,
    shared: bool = False,
) -> Any:
    """A field of a request; see :class:`Option`.

    Args:
        shared: declared in a base of several requests: told after what is their own.
    """
    declared = Option(name, kind, default, help, metavar, off)
    return field(default=default, kw_only=shared, metadata={_KEY: declared})


_KEY = "option"


@dataclass(frozen=True)
class Request:
    """What one command is asked to do, every value checked.

    Attributes:
        command: its words. makes_folder: whether it takes OUT, which is no part of what is made.
    """

    command: ClassVar[str]
    makes_folder: ClassVar[bool] = False

    @classmethod
    def asked(cls, **given: Any) -> Self:
        """The request that people's values make: of any type, checked here."""
        return cls(**given)

    def __post_init__(self) -> None:
        for name, declared in options_of(type(self)).items():
            self.fill(**{name: declared.check(getattr(self, name))})

    def fill(self, **values: Any) -> None:
        """Put what was worked out in place of what was given, while the request is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def fill_in(self, name: str, default: Callable[[], Any]) -> None:
        """Work out what was not given, and only that."""
        if getattr(self, name) is None:
            self.fill(**{name: default()})


def options_of(request: type[Request]) -> dict[str, Option]:
    """What a kind of request says, by the names of its fields."""
    own: list[Field[Any]] = sorted(fields(request), key=lambda each: each.kw_only is True)
    return {each.name: each.metadata[_KEY] for each in own}
