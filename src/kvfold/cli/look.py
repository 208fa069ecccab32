"""``kvfold look``"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvfold import numbers
from kvfold.cli.options import Location, Number, Source, explained
from kvfold.cli.output import say
from kvfold.errors import InputError
from kvfold.files import check_file, write_bytes, write_text

if TYPE_CHECKING:
    from kvfold.report.look import Picture

_DEFAULT = "The animal did not cross the street because it was too tired."


@click.command("look")
@click.argument("model", metavar="MODEL", type=Source())
@click.argument("text", required=False)
@click.option("--file", type=Location(), help="A UTF-8 text to look at instead.")
@click.option(
    "--against", type=Source(), metavar="FOLDED", help="A model folded from MODEL, drawn below it."
)
@click.option("--layer", "layers", type=Number(numbers.LAYER), multiple=True,
              help="Repeatable.  [default: middle]")  # fmt: skip
@click.option("--max-tokens", type=Number(numbers.LOOK_TOKENS), default=4096, show_default=True,
              help=explained("Of a longer text.", numbers.LOOK_TOKENS))  # fmt: skip
@click.option("--png", type=Location(), help="[default: attention.png]")
@click.option("--html", type=Location(), help="One page with every layer asked for.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
def command(
    model: str,
    text: str | None,
    file: Path | None,
    against: str | None,
    layers: tuple[int, ...],
    max_tokens: int,
    png: Path | None,
    html: Path | None,
    force: bool,
) -> None:
    """Draw which tokens each head of MODEL looks at, word by word.

    Heads that share a KV head have its number in their title. With --against, the folded model's
    maps stand below, each with its divergence from the source's: KL in nats, mean over queries.
    Long texts are summed into 128 bins, in bounded memory. PNG files of several layers get the
    layer's number in their name.
    """
    if html is None and png is None:
        png = Path("attention.png")
    if png is not None and png.name in ("", ".."):
        raise InputError(f"--png {png} is a folder", "name a file, for instance attention.png")
    layers = tuple(dict.fromkeys(layers))
    written = _paths(png, layers) + ([html] if html else [])
    if len(set(written)) < len(written):
        raise InputError("--png and --html name the same file", "give each its own name")
    for path in written:
        check_file(path, force=force)
    words = _text(text, file)
    pictures = _pictures([model] + ([against] if against else []), words, layers, max_tokens)
    if png is not None:
        for picture in pictures:
            path = png if len(pictures) == 1 else _numbered(png, picture.layer)
            write_bytes(path, picture.png, force=force)
            say(f"{path}  {picture.summary}")
    if html is not None:
        write_text(html, _page(model, against, pictures), force=force)
        say(str(html))


def _text(text: str | None, file: Path | None) -> str:
    from kvfold.quality.text import read_texts

    if text is not None and file is not None:
        raise InputError("a text and --file exclude each other", "give one of them")
    found = read_texts([file], 1) if file is not None else text or _DEFAULT
    if not found.strip():
        raise InputError("the text is empty", 'for instance: kvfold look MODEL "I have a dream"')
    return found


def _paths(png: Path | None, layers: tuple[int, ...]) -> list[Path]:
    if png is None:
        return []
    return [_numbered(png, layer) for layer in layers] if len(layers) > 1 else [png]


def _numbered(png: Path, layer: int) -> Path:
    return png.with_name(f"{png.stem}-{layer}{png.suffix}")


def _pictures(
    sources: list[str], text: str, layers: tuple[int, ...], max_tokens: int
) -> "list[Picture]":
    from contextlib import ExitStack

    import torch

    from kvfold.checkpoint.pretrained import load_tokenizer
    from kvfold.quality.run import local_folder
    from kvfold.quality.text import check_ids
    from kvfold.report.look import draw_layer
    from kvfold.report.maps import attention_layers, look

    names = [Path(source).name for source in sources]
    seen: list[dict[int, Any]] = []
    with ExitStack() as stack:
        folders = [local_folder(source, stack) for source in sources]
        tokenizer = load_tokenizer(folders[0])
        ids = torch.tensor(
            tokenizer(text, verbose=False)["input_ids"][:max_tokens], dtype=torch.int64
        )
        for folder in folders:
            model = _load(folder)
            check_ids(ids.tolist(), model.config.get_text_config().vocab_size)
            chosen = layers or (sorted(attention_layers(model))[len(attention_layers(model)) // 2],)
            seen.append(look(model, ids, chosen))
    words = [tokenizer.decode([token]).strip() or "·" for token in ids.tolist()]
    return [draw_layer(layer, names, [each[layer] for each in seen], words) for layer in seen[0]]


def _load(folder: Path) -> Any:
    """Any causal language model that transformers opens, foldable or not."""
    import torch

    from kvfold.checkpoint.pretrained import load_model

    return load_model(folder, torch.float32).eval()


def _page(model: str, against: str | None, pictures: "list[Picture]") -> str:
    from kvfold.report.page import Figure, Section, render

    title = f"Attention of {Path(model).name}" + (f" and {Path(against).name}" if against else "")
    note = (
        "Rows are queries, columns the tokens they look at; darker is more (square root of the "
        "weight). Titles: query head, the KV head it reads, and for the folded model its "
        "divergence from the source's map in nats."
    )
    sections = [
        Section(f"Layer {picture.layer}", [Figure(picture.tag, picture.summary), note])
        for picture in pictures
    ]
    return render(title, sections)
