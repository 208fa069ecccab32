"""``kvfold eval``: load checkpoints, score them on texts, check thresholds."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold.arguments import callback, choice, location, several
from kvfold.arguments import source as source_name
from kvfold.checkpoint import pretrained
from kvfold.checkpoint.gguf import is_gguf, summarize, transcode
from kvfold.checkpoint.pretrained import check_complete, load_tokenizer
from kvfold.checkpoint.source import open_checkpoint, read_config, resolve
from kvfold.errors import InputError, ThresholdError
from kvfold.numbers import EVAL_WINDOW, NEEDLE, TOKENS, Wholes
from kvfold.progress import Progress, no_progress
from kvfold.quality.device import pick_device
from kvfold.quality.needle import Retrieval, retrieve
from kvfold.quality.scores import Quality, compare
from kvfold.quality.text import read_texts, token_windows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DEFAULT_CONTEXT = 512
DTYPES = ("float32", "bfloat16", "float16")


def evaluate(
    sources: Sequence[str | Path],
    texts: Sequence[str | Path],
    *,
    context: int = DEFAULT_CONTEXT,
    max_tokens: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: Progress = no_progress,
) -> list[Quality]:
    """Compare checkpoints with the first of them, text by text.

    Args:
        sources: folders, hub names or GGUF files; the first is the reference.
        texts: UTF-8 files, each scored apart.
        context: tokens per window. max_tokens: at most so many per text, spread over it.
        dtype: ``float32``, ``bfloat16`` or ``float16``, for all models alike.
        device: torch device; a GPU if there is one by default.

    Raises:
        InputError: for anything that cannot be evaluated, before a model is loaded.

    >>> evaluate(["source", "folded"], ["held-out.txt"])  # doctest: +SKIP
    """
    sources, texts = several(sources, "SRC", source_name), several(texts, "--text", location)
    check_eval(sources, texts, context, max_tokens)
    how = choice(dtype, "--dtype", DTYPES), pick_device(device)
    callback(progress, "progress")
    contents = [read_texts([text], context) for text in texts]
    with ExitStack() as stack:
        folders = ready_folders(sources, stack)
        tokenizer = load_tokenizer(folders[0])
        words = read_config(folders[0]).get("vocab_size")
        windows = [token_windows(tokenizer, text, context, max_tokens, words) for text in contents]
        models = _load_models(sources, folders, *how)
        results: list[Quality] = []
        for path, rows in zip(texts, windows, strict=True):
            results += compare(models, rows, Path(path).name, progress)
        return results


def find_needles(
    sources: Sequence[str | Path],
    lengths: Sequence[int],
    *,
    dtype: str = "float32",
    device: str | None = None,
    progress: Progress = no_progress,
) -> list[Retrieval]:
    """Pass-key retrieval of checkpoints at several depths; see ``quality.needle``.

    >>> find_needles(["source", "folded"], [512, 2048])  # doctest: +SKIP
    """
    sources = several(sources, "SRC", source_name)
    check_sources(sources)
    lengths = Wholes(NEEDLE).check(lengths, "--needle")
    how = choice(dtype, "--dtype", DTYPES), pick_device(device)
    callback(progress, "progress")
    with ExitStack() as stack:
        folders = ready_folders(sources, stack)
        tokenizer = load_tokenizer(folders[0])
        models = _load_models(sources, folders, *how)
        return retrieve(models, tokenizer, lengths, progress=progress)


def check_eval(
    sources: Sequence[str | Path],
    texts: Sequence[str | Path],
    context: int,
    max_tokens: int | None = None,
) -> None:
    """Everything that can be checked without torch."""
    if not texts:
        raise InputError("no text to evaluate on", "name one or more files with --text")
    EVAL_WINDOW.check(context, "--context")
    if max_tokens is not None and TOKENS.check(max_tokens, "--max-tokens") < context:
        raise InputError(
            f"--max-tokens {max_tokens} is less than one window of {context}", "raise it"
        )
    check_sources(sources, context)


def check_sources(sources: Sequence[str | Path], context: int = 0) -> None:
    """Open what is here of the models.

    Raises:
        InputError: for one that cannot be opened, or has learned fewer positions than ``context``.
    """
    if not sources:
        raise InputError("no model to evaluate", "name one or more folders")
    for source in sources:
        if is_gguf(source):
            summarize(Path(source).expanduser())
        elif Path(source).expanduser().exists():
            positions = open_checkpoint(source).config.get("n_positions")  # GPT-2's, learned
            if isinstance(positions, int) and context > positions:
                raise InputError(
                    f"--context {context} is longer than the {positions} positions of {source}",
                    f"use at most --context {positions}",
                )


def _load_models(
    sources: Sequence[str | Path], folders: Sequence[Path], dtype: str, device: "torch.device"
) -> "list[tuple[str, PreTrainedModel]]":
    return [
        (str(source), load_model(folder, dtype, device))
        for source, folder in zip(sources, folders, strict=True)
    ]


def check_thresholds(
    results: Sequence[Quality], max_kl: float | None, max_ppl_ratio: float | None
) -> None:
    """Raise if a model other than the first misses a threshold.

    Raises:
        ThresholdError: naming the model, the text and both numbers.
    """
    for result in results:
        for what, value, limit in (
            ("KL", result.kl, max_kl),
            ("perplexity ratio", result.ratio, max_ppl_ratio),
        ):
            if limit is not None and not value <= limit:
                raise ThresholdError(
                    f"{result.name} on {result.text}: {what} {value:.4g} is above {limit:g}",
                    "fold to more KV heads, or heal the model",
                )


def local_folder(source: str | Path, stack: ExitStack) -> Path:
    """A Hugging Face folder for any source; a GGUF file is unpacked until ``stack`` closes."""
    if not is_gguf(source):
        return resolve(source)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvfold-")))
    transcode(Path(source).expanduser(), folder)
    return folder


def ready_folders(sources: Sequence[str | Path], stack: ExitStack) -> list[Path]:
    """The folders of checkpoints that hold every tensor their models need.

    Raises:
        CheckpointError: naming what one of them lacks.
    """
    folders = [local_folder(source, stack) for source in sources]
    for folder in folders:
        check_complete(open_checkpoint(folder))
    return folders


def load_model(
    folder: Path, dtype: str = "float32", device: "str | torch.device | None" = None
) -> "PreTrainedModel":
    """The folder's model, ready to evaluate."""
    import torch

    where = pick_device(device)
    return pretrained.load_model(folder, getattr(torch, dtype)).to(where).eval()
