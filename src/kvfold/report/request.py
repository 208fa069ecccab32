"""What ``kvfold look`` is asked to draw, checked value by value. No torch."""

from dataclasses import dataclass
from pathlib import Path

from kvfold.errors import InputError
from kvfold.numbers import LAYER, LOOK_TOKENS
from kvfold.requests import Model, Place, Request, Several, Text, option


@dataclass(frozen=True)
class LookRequest(Request):
    """A model, perhaps one folded from it, a text, and where the drawings go.

    Attributes:
        text: or file, a text to read; an example if there is neither.
        layers: none for the middle one. png: ``attention.png`` unless only a page is asked for.

    Raises:
        InputError: naming the option and what it expects.
    """

    command = "look"

    model: str = option("MODEL", Model())
    text: str | None = option("TEXT", Text(), None, metavar="[TEXT]")
    file: str | None = option("--file", Place(), None, "A UTF-8 text to look at instead.")
    against: str | None = option(
        "--against",
        Model(),
        None,
        "A model folded from MODEL, drawn beside it.",
        metavar="FOLDED",
    )
    layers: tuple[int, ...] = option(
        "--layer", Several(LAYER), (), "Repeatable.  [default: middle]"
    )
    max_tokens: int = option("--max-tokens", LOOK_TOKENS, 4096, "Of a longer text.")
    png: str | None = option("--png", Place(), None, "[default: attention.png]")
    html: str | None = option("--html", Place(), None, "One page with every layer asked for.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fill(layers=tuple(dict.fromkeys(self.layers)))
        if self.text is not None and self.file is not None:
            raise InputError("a text and --file exclude each other", "give one of them")
        if self.html is None and self.png is None:
            self.fill(png="attention.png")
        if self.png is not None and Path(self.png).name in ("", ".."):
            raise InputError(
                f"--png {self.png} is a folder", "name a file, for instance attention.png"
            )
        written = self.written
        if len(set(written)) < len(written):
            raise InputError("--png and --html name the same file", "give each its own name")

    @property
    def sources(self) -> list[str]:
        """The models, the source first."""
        return [self.model, *([self.against] if self.against else [])]

    @property
    def written(self) -> list[Path]:
        """Every file that is known before the model is open."""
        pictures = [self.picture(layer, len(self.layers)) for layer in self.layers]
        alone = [] if self.png is None or pictures else [Path(self.png)]
        page = [] if self.html is None else [Path(self.html)]
        return [*(path for path in pictures if path), *alone, *page]

    def picture(self, layer: int, count: int) -> Path | None:
        """Where one of so many pictures goes: layers of several have their number in the name."""
        if self.png is None:
            return None
        png = Path(self.png)
        return png if count == 1 else png.with_name(f"{png.stem}-{layer}{png.suffix}")
