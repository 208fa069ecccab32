"""``kvfold verify``: do the engines that are installed give transformers' greedy tokens?"""

import gc
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from kvfold.arguments import callback
from kvfold.checkpoint.source import read_config
from kvfold.engines.ask import Reply, ask
from kvfold.engines.known import ENGINES
from kvfold.engines.outcome import Outcome, judge
from kvfold.engines.reference import Continuation, reference
from kvfold.engines.request import VerifyRequest
from kvfold.errors import InputError, RunError, ThresholdError
from kvfold.progress import Progress, no_progress
from kvfold.quality.device import pick_device
from kvfold.quality.run import check_sources, ready_folders
from kvfold.quality.text import read_texts

_SOON = 120.0  # seconds; to say what is installed takes a tenth of one
_MOST = 1000  # prompts


@dataclass(frozen=True)
class Verification:
    """A checkpoint in several engines.

    Attributes:
        reference: what transformers says, and version is whose. near: gaps that count as none.
    """

    source: str
    version: str
    dtype: str
    near: float
    reference: tuple[Continuation, ...]
    texts: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def same(self) -> bool:
        """Whether some engine answered, and all that did gave the same tokens."""
        found = {outcome.status for outcome in self.outcomes} & {"same", "differs", "failed"}
        return found == {"same"}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        prompts = [
            {"prompt": each.prompt, "ids": each.ids, "tokens": each.tokens, "text": text}
            for each, text in zip(self.reference, self.texts, strict=True)
        ]
        return {
            "source": self.source,
            "reference": {"engine": "transformers", "version": self.version, "dtype": "float32"},
            "dtype": self.dtype,
            "near": self.near,
            "same": self.same,
            "prompts": prompts,
            "engines": [outcome.as_dict() for outcome in self.outcomes],
        }


def verify(
    source: str | Path,
    *,
    engines: Sequence[str] | None = VerifyRequest.engines,
    prompts: Sequence[str] = VerifyRequest.prompts,
    file: str | Path | None = VerifyRequest.file,
    tokens: int = VerifyRequest.tokens,
    dtype: str = VerifyRequest.dtype,
    near: float = VerifyRequest.near,
    pythons: Sequence[str] = VerifyRequest.pythons,
    llama_cpp: str | Path | None = VerifyRequest.llama_cpp,
    timeout: float = VerifyRequest.timeout,
    device: str | None = VerifyRequest.device,
    progress: Progress = no_progress,
) -> Verification:
    """Compare engines' greedy tokens with those of transformers in float32.

    Args:
        source: a folder, hub name or GGUF file, folded or not.
        engines: of ``vllm``, ``vllm+kvfold`` (with kvfold's attention), ``llama.cpp``, ``litgpt``,
            ``ctranslate2`` and ``mistral.rs``; all that are found by default.
        prompts, file: to go on from; the lines of a file are one each. Three are built in.
        tokens: after each prompt. dtype: that engines compute in.
        near: a difference counts as none if transformers' own two logits are no further apart.
        pythons: ``"vllm=/path/to/python"`` for engines in other environments.
        llama_cpp: a checkout of llama.cpp, for its converter. timeout: seconds for each engine.

    Raises:
        InputError: for anything that cannot be asked; if none of the engines is found.

    >>> verify("folded", engines=["vllm"]).same  # doctest: +SKIP
    True
    """
    request = VerifyRequest.asked(
        source=source, engines=engines, prompts=prompts, file=file, tokens=tokens, dtype=dtype,
        near=near, pythons=pythons, llama_cpp=llama_cpp, timeout=timeout, device=device,
    )  # fmt: skip
    callback(progress, "progress")
    return run_verify(request, progress)


def run_verify(request: VerifyRequest, progress: Progress = no_progress) -> Verification:
    """Ask every engine of a request; see :func:`verify`."""
    check_sources([request.source])
    prompts = _prompts(request)
    pick_device(request.device)
    found = _find(request)
    with ExitStack() as stack:
        (folder,) = ready_folders([request.source], stack)
        expected, tokenizer = reference(folder, prompts, request.tokens, request.device, progress)
        gc.collect()  # the model: engines need the memory
        outcomes = []
        for name, reply in found.items():
            if reply.verdict == "answered":
                reply = _ask(request, name, folder.resolve(), expected, progress)
            outcomes.append(judge(name, reply, expected, tokenizer, request.near))
    return Verification(
        source=request.source,
        version=metadata.version("transformers"),
        dtype=request.dtype,
        near=request.near,
        reference=tuple(expected),
        texts=tuple(tokenizer.decode(each.tokens) for each in expected),
        outcomes=tuple(outcomes),
    )


def check_verified(found: Verification) -> None:
    """Raise if an engine gave other tokens, or none though it is there.

    Raises:
        ThresholdError: for other tokens. RunError: if an engine failed, or none answered.
    """
    for outcome in found.outcomes:
        if outcome.status == "differs":
            raise ThresholdError(
                f"{outcome.engine} gives other tokens than transformers",
                "--near lets close calls pass; see the gap between the two logits",
            )
    for outcome in found.outcomes:
        if outcome.status == "failed":
            raise RunError(f"{outcome.engine} failed: {outcome.why}", "try it by its own command")
    if not found.same:
        raise RunError("no engine opened the checkpoint", "the table says why")


def _prompts(request: VerifyRequest) -> list[str]:
    """The prompts of the file and those beside it."""
    lines = read_texts([request.file], 1).splitlines() if request.file else []
    prompts = [line for line in lines if line.strip()]
    prompts += request.given
    if not prompts or len(prompts) > _MOST:
        raise InputError(f"{len(prompts)} prompts", f"give at least one, at most {_MOST:,}")
    return prompts


def _find(request: VerifyRequest) -> dict[str, Reply]:
    """What is known of each engine that was asked for; of those that are found, if none was.

    Raises:
        InputError: if none is found.
    """
    found = {}
    for name in request.engines or ENGINES:
        task = {"llama_cpp": request.checkout}
        reply = ask(ENGINES[name], request.python_of(name), task, _SOON)
        if reply.version is not None and reply.verdict == "failed":
            reply.verdict = "answered"  # a version is all that was asked for
        if request.engines or reply.verdict == "answered":
            found[name] = reply
    if not any(reply.verdict == "answered" for reply in found.values()):
        names = request.engines or tuple(ENGINES)
        whys = [f"{name}: {reply.why}" for name, reply in found.items()]
        raise InputError(
            "; ".join(whys) or f"none of {', '.join(names)} is installed here",
            f"{ENGINES[names[0]].get}, or --python {names[0]}=… for another environment",
        )
    return found


def _ask(
    request: VerifyRequest,
    name: str,
    folder: Path,
    expected: Sequence[Continuation],
    progress: Progress,
) -> Reply:
    """Give an engine the checkpoint and the prompts; conversions are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="kvfold-") as work:
        task = {
            "folder": str(folder),
            "work": work,
            "prompts": [each.ids for each in expected],
            "texts": [each.prompt for each in expected],
            "tokens": request.tokens,
            "dtype": request.dtype,
            "model_type": str(read_config(folder).get("model_type", "")),
            "llama_cpp": request.checkout,
        }
        stages = _Stages(name, progress)
        reply = ask(ENGINES[name], request.python_of(name), task, request.timeout, stages)
        stages.end()
        return reply


class _Stages:
    """A progress bar for each thing that an engine does, one after the other."""

    def __init__(self, name: str, progress: Callable[[str, int, int], None]) -> None:
        self._name, self._progress, self._label = name, progress, ""

    def __call__(self, words: str) -> None:
        self.end()
        self._label = f"{self._name}: {words}"
        self._progress(self._label, 0, 1)

    def end(self) -> None:
        """What was going on is done."""
        if self._label:
            self._progress(self._label, 1, 1)
        self._label = ""
