"""A request's calibration text as windows of tokens. No torch at import."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.checkpoint.gguf import describe, is_gguf
from kvfold.checkpoint.pretrained import load_tokenizer
from kvfold.checkpoint.source import resolve
from kvfold.errors import InputError
from kvfold.fold.preview import Preview
from kvfold.fold.request import LEAST_TOKENS, ConvertRequest
from kvfold.geometry import AttentionGeometry
from kvfold.quality.text import GivenText, spread, token_windows

if TYPE_CHECKING:
    import torch

_FIRST_TOKENS = 2048  # at most
_HELD_OUT, _HELD_OUT_OF = 8, 16  # windows at most, and of how many one where all are needed


@dataclass(frozen=True)
class Cut:
    """A text as token ids.

    Attributes:
        calibration: windows ``[N, T]`` to fold and to fit on.
        held_out: ``[M, T]``, windows of the same text that no step looks at; none of a short one.
    """

    calibration: "torch.Tensor"
    held_out: "torch.Tensor"

    @classmethod
    def of(cls, parts: "Sequence[Cut]") -> "Cut":
        """Several texts behind one another."""
        import torch

        return cls(
            torch.cat([part.calibration for part in parts]),
            torch.cat([part.held_out for part in parts]),
        )


def early_windows(found: Preview) -> Cut | None:
    """:func:`windows_of` from the source as it is; of a GGUF file its metadata says enough."""
    request = found.request
    if not is_gguf(request.source):
        return _early(found, resolve(request.source))
    with tempfile.TemporaryDirectory(prefix="kvfold-") as apart:
        if found.text is not None or request.writes_own:
            describe(Path(request.source).expanduser(), Path(apart), tokenizer=True)
        return _early(found, Path(apart))


def _early(found: Preview, folder: Path) -> Cut | None:
    request = found.request
    cut = windows_of(found.config, found.source, folder, request, found.text)
    if not request.writes_own:
        return cut
    load_tokenizer(folder)
    return None  # a part is yet to be written


def windows_of(
    config: Mapping[str, Any],
    geometry: AttentionGeometry,
    folder: Path,
    request: ConvertRequest,
    text: GivenText | None,
    write: "Callable[[int, int], torch.Tensor] | None" = None,
) -> Cut | None:
    """The calibration text as tokens; None if none is needed.

    Args:
        write: makes so many windows of so many tokens, where the model writes some of the text:
            all of it, or half if there is text besides.
    """
    if request.keeps(geometry):
        return None
    longest = config.get("max_position_embeddings") or request.context
    context = min(request.context, int(longest))
    parts = []
    tokens = request.calibration_tokens
    if request.writes_own and text is not None:
        tokens = tokens // 2
    if text is not None:
        parts.append(_of_text(config, folder, text, context, tokens))
    if write is not None:
        own = write(max(1, tokens // context) + _HELD_OUT, context)
        parts.append(cut(own, tokens))
    if not parts:
        return None
    found = Cut.of(parts)
    if request.searches and not len(found.held_out):
        raise InputError(
            f"the calibration text has {found.calibration.numel()} tokens, none to hold out; "
            f"expected at least {_HELD_OUT_OF * context}",
            "give more text, or a smaller --context",
        )
    return found


def _of_text(
    config: Mapping[str, Any], folder: Path, text: GivenText, context: int, tokens: int
) -> Cut:
    windows = token_windows(
        load_tokenizer(folder), text.text, context, vocabulary=config.get("vocab_size")
    )
    if windows.numel() < LEAST_TOKENS:
        raise InputError(
            f"the calibration text has {windows.numel()} tokens; expected at least {LEAST_TOKENS}",
            "give more text: 50,000 tokens is good",
        )
    return cut(windows, tokens)


def cut(windows: "torch.Tensor", tokens: int) -> Cut:
    """At most so many tokens of ``[N, T]`` to calibrate on, spread evenly, and others to hold out.

    Where all are needed, one in ``_HELD_OUT_OF`` is held out.
    """
    import torch

    count = len(windows)
    chosen = spread(count, tokens // windows.shape[1])
    rest = torch.ones(count, dtype=torch.bool)
    rest[chosen] = False
    others = rest.nonzero()[:, 0]
    if len(others) < min(_HELD_OUT, len(chosen) // _HELD_OUT_OF):
        last = torch.arange(_HELD_OUT_OF - 1, len(chosen), _HELD_OUT_OF)
        others = chosen[last]
        keep = torch.ones(len(chosen), dtype=torch.bool)
        keep[last] = False
        chosen = chosen[keep]
    held_out = others[spread(len(others), _HELD_OUT)] if len(others) else others
    return Cut(windows[chosen], windows[held_out])


def first_tokens(windows: "torch.Tensor", vocabulary: int) -> "torch.Tensor | None":
    """Tokens that a text may begin with, which calibration windows ``[N, T]`` have N of.

    Attention falls back on a text's first token (an attention sink), whose state is a function of
    nothing but itself: what goes wrong with it goes wrong in all that follows. Half of them are
    tokens of the windows, half are spread over the vocabulary.

    Returns:
        ``[M]``, each once; None where all windows begin alike, as they do after a
        beginning-of-sequence token.
    """
    import torch

    if (windows[:, 0] == windows[0, 0]).all():
        return None
    half = _FIRST_TOKENS // 2
    known = torch.arange(vocabulary, device="cpu")
    return torch.cat([_spread(windows.cpu().unique(), half), _spread(known, half)]).unique()


def _spread(ids: "torch.Tensor", count: int) -> "torch.Tensor":
    """At most so many of them, evenly."""
    return ids[:: -(-len(ids) // count)]
