"""Text in, windows of tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.checkpoint.inputs import Print, read_printed
from kvfold.documents import read_bytes
from kvfold.errors import InputError, RunError

if TYPE_CHECKING:
    import torch

# A tokenizer of transformers; its classes are built at run time and have no useful types.
Tokenizer = Any
LARGEST_TEXT = 1 << 32  # bytes; its tokens are held in memory too, ten times as large
_BYTES_PER_TOKEN_AT_LEAST = 1  # byte-level tokenizers make at most one token of a byte


@dataclass(frozen=True)
class GivenText:
    """Text of somebody's files, read once.

    Attributes:
        prints: what tells the files from changed ones; see ``checkpoint.inputs``.
    """

    text: str
    prints: dict[Path, Print]


def read_texts(paths: Sequence[str | Path], least_tokens: int) -> str:
    """The text of :func:`read_given`."""
    return read_given(paths, least_tokens).text


def read_given(paths: Sequence[str | Path], least_tokens: int) -> GivenText:
    """Read and join text files (no torch).

    Raises:
        InputError: if one is missing, is not UTF-8, or all of them together are too short to
            hold ``least_tokens`` tokens whatever the tokenizer.
    """
    texts: list[str] = []
    prints: dict[Path, Print] = {}
    for path in (Path(path).expanduser() for path in paths):
        text, prints[path] = _read_text(path)
        texts.append(text)
    size = sum(len(text.encode()) for text in texts)
    if size < least_tokens * _BYTES_PER_TOKEN_AT_LEAST:
        names = ", ".join(str(path) for path in paths)
        state = "is empty" if not size else f"has only {size} bytes"
        raise InputError(
            f"the text {names} {state}; expected at least {least_tokens} tokens",
            "give more text: a few hundred kilobytes of prose is good",
        )
    return GivenText("\n\n".join(texts), prints)


def _read_text(path: Path) -> tuple[str, Print]:
    hint = "give a plain UTF-8 text file; larger ones are read piecewise as .jsonl"
    data, found = read_printed(path, lambda path: read_bytes(path, LARGEST_TEXT, hint))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start})",
            "convert it first, for instance: iconv -f latin1 -t utf-8",
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n"), found  # as Python reads text files


def builtin_calibration_text() -> str:
    """The small text that ships with kvfold (prose, code, dialogue, a few languages)."""
    return (resources.files("kvfold") / "data" / "calibration.txt").read_text(encoding="utf-8")


def python_topics() -> dict[str, str]:
    """The language reference that ``help()`` shows, topic by topic.

    Raises:
        RunError: where Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RunError(
            "this Python came without pydoc_data, whose text was asked for",
            "install the full standard library (Debian: libpython3-stdlib)",
        ) from error
    return dict(sorted(topics.items()))


def check_ids(ids: Sequence[int], vocabulary: int | None) -> None:
    """Refuse token ids that a model of ``vocabulary`` tokens has no embedding for.

    Raises:
        InputError: naming the id.
    """
    if vocabulary is not None and ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise InputError(
            f"the tokenizer gives the id {wrong}; the model's vocabulary has {vocabulary}",
            "the tokenizer files belong to another model; copy those of the source",
        )


def token_windows(
    tokenizer: Tokenizer,
    text: str,
    context: int,
    max_tokens: int | None = None,
    vocabulary: int | None = None,
) -> "torch.Tensor":
    """Cut a text into windows ``[N, context]`` of token ids (int64).

    Windows do not overlap. With ``max_tokens``, the windows taken are spread evenly over the
    text. Models whose tokenizer puts a beginning-of-sequence token first get one at the start
    of every window.

    Args:
        vocabulary: tokens that the model knows.

    Raises:
        InputError: if the text does not fill one window, or holds ids beyond the vocabulary.
    """
    import torch

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_tokens(tokenizer)
    check_ids([*opening, *ids], vocabulary)
    body = context - len(opening)
    count = len(ids) // body
    if count == 0:
        raise InputError(
            f"the text has {len(ids)} tokens; expected at least {body} (one window)",
            "give more text, or a smaller --context",
        )
    windows = torch.tensor(ids[: count * body], dtype=torch.int64).reshape(count, body)
    wanted = count if max_tokens is None else max_tokens // context
    chosen = spread(count, wanted)
    first = torch.tensor(opening, dtype=torch.int64).expand(len(chosen), -1)
    return torch.cat([first, windows[chosen]], dim=1)


def spread(count: int, wanted: int) -> "torch.Tensor":
    """Which of ``count`` things to take, at least one, spread evenly over them.

    >>> spread(10, 4).tolist()
    [0, 2, 5, 7]
    """
    import torch

    taken = max(1, min(count, wanted))
    return torch.arange(taken) * count // taken


def opening_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every text: a beginning-of-sequence token, or nothing."""
    start = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a")["input_ids"]
    return [start] if start is not None and ids[:1] == [start] else []
