"""``kvfold eval``: load checkpoints, score them on texts, check thresholds."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvfold.arch.decoder import learned_positions
from kvfold.arguments import callback, several
from kvfold.arguments import source as source_name
from kvfold.checkpoint import pretrained
from kvfold.checkpoint.gguf import is_gguf, summarize, transcode
from kvfold.checkpoint.language import language_config
from kvfold.checkpoint.pretrained import check_weights, load_tokenizer
from kvfold.checkpoint.source import open_weights, read_config, resolve
from kvfold.errors import InputError, ThresholdError
from kvfold.numbers import iterated
from kvfold.progress import Progress, no_progress
from kvfold.quality.device import pick_device
from kvfold.quality.needle import Retrieval, Way, retrieve
from kvfold.quality.request import EvalRequest
from kvfold.quality.scores import Quality, compare
from kvfold.quality.tasks import TaskScore, harness, run_tasks
from kvfold.quality.text import read_texts, token_windows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def evaluate(
    sources: Sequence[str | Path],
    texts: Sequence[str | Path],
    *,
    context: int = EvalRequest.context,
    max_tokens: int | None = EvalRequest.max_tokens,
    dtype: str = EvalRequest.dtype,
    device: str | None = EvalRequest.device,
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
    request = EvalRequest.asked(
        **_named(sources),
        texts=texts,
        context=context,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
    )
    callback(progress, "progress")
    check_eval(request)
    return score_texts(request, progress)


def score_texts(request: EvalRequest, progress: Progress = no_progress) -> list[Quality]:
    """Compare a request's models on its texts; see :func:`evaluate`."""
    contents = [read_texts([text], request.context) for text in request.texts]
    with _Opened(request) as opened:
        windows = [
            token_windows(
                opened.tokenizer, text, request.context, request.max_tokens, opened.vocabulary
            )
            for text in contents
        ]
        models = opened.models()
        results: list[Quality] = []
        for path, each in zip(request.texts, windows, strict=True):
            results += compare(models, each, Path(path).name, progress)
        return results


def find_needles(
    sources: Sequence[str | Path],
    lengths: Sequence[int],
    *,
    dtype: str = EvalRequest.dtype,
    device: str | None = EvalRequest.device,
    progress: Progress = no_progress,
) -> list[Retrieval]:
    """Pass-key retrieval of checkpoints at several depths; see ``quality.needle``.

    >>> find_needles(["source", "folded"], [512, 2048])  # doctest: +SKIP
    """
    request = EvalRequest.asked(
        **_named(sources), lengths=tuple(iterated(lengths, "--needle")), dtype=dtype, device=device
    )
    callback(progress, "progress")
    check_eval(request)
    return score_needles(request, progress)


def score_needles(
    request: EvalRequest,
    progress: Progress = no_progress,
    caches: Mapping[str, Way] | None = None,
) -> list[Retrieval]:
    """Ask a request's models for pass keys; see :func:`find_needles`.

    Args:
        caches: that they also answer with; see ``quality.needle.retrieve``.
    """
    with _Opened(request) as opened:
        return retrieve(
            opened.models(), opened.tokenizer, request.lengths or (), progress=progress,
            caches=caches,
        )  # fmt: skip


def score_tasks(request: EvalRequest) -> list[TaskScore]:
    """Run lm-evaluation-harness on a request's models."""
    with ExitStack() as stack:
        folders = [(source, local_folder(source, stack)) for source in request.sources]
        return run_tasks(
            folders,
            request.tasks or (),
            own=request.task_folder,
            limit=request.limit,
            dtype=request.dtype,
            device=request.device,
        )


def _named(sources: Sequence[str | Path]) -> dict[str, Any]:
    """The reference and the others, as a request has them."""
    found = several(sources, "SRC", source_name)
    if not found:
        raise InputError("no model to evaluate", "name one or more folders")
    return {"source": found[0], "others": found[1:]}


def check_eval(request: EvalRequest) -> None:
    """What can be checked before a model is loaded; without torch, unless tasks are asked for.

    Raises:
        InputError: with the reason why something cannot be evaluated.
    """
    check_sources(request.sources, request.context if request.texts else 0)
    if request.tasks:
        harness()
        own = request.task_folder
        if own is not None and not any(Path(own).rglob("*.yaml")):
            raise InputError(f"--task-folder {own} holds no task", "the harness's are *.yaml files")
        pick_device(request.device)


def check_sources(sources: Sequence[str | Path], context: int = 0) -> None:
    """Open what is here of the models.

    Raises:
        InputError: for one that cannot be opened, or has learned fewer positions than ``context``.
    """
    for source in sources:
        if is_gguf(source):
            summarize(Path(source).expanduser())
        elif Path(source).expanduser().exists():
            positions = learned_positions(open_weights(source).config)
            if positions is not None and context > positions:
                raise InputError(
                    f"--context {context} is longer than the {positions} positions of {source}",
                    f"use at most --context {positions}",
                )


class _Opened:
    """A request's models as folders that hold every tensor, while a block runs."""

    def __init__(self, request: EvalRequest) -> None:
        self._request = request
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.device = pick_device(self._request.device)
        with ExitStack() as stack:
            self._folders = ready_folders(self._request.sources, stack)
            self.tokenizer = load_tokenizer(self._folders[0])
            config = language_config(read_config(self._folders[0]))
            self.vocabulary = (config.get("text_config") or config).get("vocab_size")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def models(self) -> "list[tuple[str, PreTrainedModel]]":
        """Each model in memory, beside its name."""
        return [
            (source, load_model(folder, self._request.dtype, self.device))
            for source, folder in zip(self._request.sources, self._folders, strict=True)
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
        check_weights(folder)
    return folders


def load_model(
    folder: Path, dtype: str = "float32", device: "str | torch.device | None" = None
) -> "PreTrainedModel":
    """The folder's model, ready to evaluate."""
    import torch

    where = pick_device(device)
    return pretrained.load_model(folder, getattr(torch, dtype)).to(where).eval()
