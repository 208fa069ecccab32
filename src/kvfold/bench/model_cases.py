"""What ``kvfold bench model`` measures, checked before PyTorch is imported."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.arguments import several, source
from kvfold.bench.cases import (
    DEFAULT_WORKING_SET,
    check_cases,
    check_dtype,
    check_memory,
    check_run,
)
from kvfold.bench.timing import DEFAULT_ROUNDS
from kvfold.checkpoint.gguf import is_gguf, summarize
from kvfold.checkpoint.source import open_checkpoint, peek_config
from kvfold.errors import InputError
from kvfold.numbers import BATCH, CONTEXT, STEPS, Wholes

GATE_STEPS = 4  # decode steps that are compared before anything is timed
_LEARNED_POSITIONS = "n_positions"  # GPT-2's name for them: a model cannot go beyond


@dataclass(frozen=True)
class ModelRequest:
    """Every combination of models, contexts and batches, each with every implementation.

    Attributes:
        paths: folders, hub names or GGUF files. dtypes: of kvfold's caches.
        tokens: decode steps per sample. text: file the prompt is taken from, or None for random
            tokens. threads: PyTorch's, or None for as many as it uses now. working_set: bytes to
            read when measuring bandwidth.

    Raises:
        InputError: for what cannot be measured.
    """

    paths: Sequence[str]
    contexts: Sequence[int] = (512,)
    batches: Sequence[int] = (1,)
    dtypes: Sequence[str] = ("bf16", "int8", "int4")
    tokens: int = 16
    text: Path | None = None
    rounds: int = DEFAULT_ROUNDS
    threads: int | None = None
    working_set: int = DEFAULT_WORKING_SET

    def __post_init__(self) -> None:
        several(self.dtypes, "--dtype", check_dtype)
        if not several(self.paths, "PATH", source):
            raise InputError("no model given", "name one or more folders")
        Wholes(CONTEXT).check(self.contexts, "--context")
        Wholes(BATCH).check(self.batches, "--batch")
        STEPS.check(self.tokens, "--tokens")
        check_run(self.rounds, self.threads, self.working_set)
        check_cases(len(self.contexts) * len(self.batches))
        if self.text is not None:
            from kvfold.quality.text import read_texts

            read_texts([self.text], max(self.contexts))
        for path in self.paths:
            self._check_model(path)
        needed = self.working_set + sum(self._memory(path) for path in self.paths)
        check_memory(needed, "fewer models, a shorter --context or a smaller --batch need less")

    @property
    def steps(self) -> int:
        """Tokens that a run decodes after the prompt."""
        return GATE_STEPS + 1 + self.rounds * self.tokens

    def cases(self) -> Iterator[tuple[int, int]]:
        """Context and batch."""
        for batch in self.batches:
            for context in self.contexts:
                yield context, batch

    def _memory(self, path: str) -> int:
        """Bytes of weights and of all caches; 0 for a model that is not here yet."""
        folder = Path(path).expanduser()
        if is_gguf(path):
            return folder.stat().st_size * 4  # 4 bits become 16
        if not folder.exists():
            return 0
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        tokens = max(context * batch for context, batch in self.cases())
        per_token = open_checkpoint(folder).geometry.kv_bytes_per_token()
        return weights + (1 + len(self.dtypes)) * tokens * per_token

    def _check_model(self, path: str) -> None:
        if is_gguf(path):
            summarize(Path(path).expanduser())
            return
        config: dict[str, Any] = peek_config(path)
        if Path(path).expanduser().exists():
            open_checkpoint(path)
        positions = config.get(_LEARNED_POSITIONS)
        if positions is not None and max(self.contexts) + self.steps > positions:
            raise InputError(
                f"{path} has {positions} positions; --context {max(self.contexts)} and "
                f"{self.steps} decode steps need {max(self.contexts) + self.steps}",
                "a shorter --context, fewer --rounds or fewer --tokens",
            )
