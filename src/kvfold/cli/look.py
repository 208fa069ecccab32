"""``kvfold look``"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvfold.cli.output import say
from kvfold.cli.parse import asks
from kvfold.errors import InputError
from kvfold.files import check_file, write_bytes, write_text
from kvfold.report.request import LookRequest

if TYPE_CHECKING:
    from kvfold.report.look import Picture

_DEFAULT = "The animal did not cross the street because it was too tired."


@click.command("look")
@asks(LookRequest)
@click.option("--force", is_flag=True, help="Replace files that exist.")
def command(request: LookRequest, force: bool) -> None:
    """Draw which tokens each head of MODEL looks at, word by word.

    Heads that share a KV head have its number and its colour in their title. With --against, the
    folded model's maps stand beside the source's, each with its divergence from it: KL in nats,
    mean over queries.
    Long texts are summed into 128 bins, in bounded memory. PNG files of several layers get the
    layer's number in their name.
    """
    for path in request.written:
        check_file(path, force=force)
    pictures = _pictures(request, _text(request))
    for picture in pictures:
        place = request.picture(picture.layer, len(pictures))
        if place is not None:
            write_bytes(place, picture.png, force=force)
            say(f"{place}  {picture.summary}")
    if request.html is not None:
        write_text(Path(request.html), _page(request, pictures), force=force)
        say(request.html)


def _text(request: LookRequest) -> str:
    from kvfold.quality.text import read_texts

    found = request.text or _DEFAULT
    if request.file is not None:
        found = read_texts([request.file], 1)
    if not found.strip():
        raise InputError("the text is empty", 'for instance: kvfold look MODEL "I have a dream"')
    return found


def _pictures(request: LookRequest, text: str) -> "list[Picture]":
    from contextlib import ExitStack

    import torch

    from kvfold.checkpoint.pretrained import load_tokenizer
    from kvfold.quality.run import local_folder
    from kvfold.quality.text import check_ids
    from kvfold.report.look import draw_layer
    from kvfold.report.maps import attention_layers, look

    names = [Path(source).name for source in request.sources]
    seen: list[dict[int, Any]] = []
    with ExitStack() as stack:
        folders = [local_folder(source, stack) for source in request.sources]
        tokenizer = load_tokenizer(folders[0])
        ids = torch.tensor(
            tokenizer(text, verbose=False)["input_ids"][: request.max_tokens], dtype=torch.int64
        )
        for folder in folders:
            model = _load(folder)
            check_ids(ids.tolist(), model.config.get_text_config().vocab_size)
            drawn = sorted(attention_layers(model))
            chosen = request.layers or (drawn[len(drawn) // 2],)
            seen.append(look(model, ids, chosen))
    words = [tokenizer.decode([token]).strip() or "·" for token in ids.tolist()]
    return [draw_layer(layer, names, [each[layer] for each in seen], words) for layer in seen[0]]


def _load(folder: Path) -> Any:
    """Any causal language model that transformers opens, foldable or not."""
    import torch

    from kvfold.checkpoint.pretrained import load_model

    return load_model(folder, torch.float32).eval()


def _page(request: LookRequest, pictures: "list[Picture]") -> str:
    from kvfold.report.page import Figure, Section, render

    title = "Attention of " + " and ".join(Path(source).name for source in request.sources)
    note = (
        "Rows are queries, columns the tokens they look at; darker is more (square root of the "
        "weight). Titles: query head, the KV head it reads, and for the folded model, which stands "
        "to the right, its divergence from the source's map in nats."
    )
    sections = [
        Section(f"Layer {picture.layer}", [Figure(picture.tag, picture.summary), note])
        for picture in pictures
    ]
    return render(title, sections)
