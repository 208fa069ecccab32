"""What ``kvfold bench model`` measures, checked before PyTorch is imported."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.arch.decoder import describe, learned_positions
from kvfold.bench.cases import DTYPES, USUAL_DTYPES, TimedRequest, check_cases
from kvfold.checkpoint.gguf import is_gguf, summarize
from kvfold.checkpoint.repeated import check_heads
from kvfold.checkpoint.source import open_checkpoint, open_weights, peek_config, read_config
from kvfold.errors import InputError
from kvfold.numbers import BATCH, CONTEXT, STEPS, Wholes
from kvfold.quality.device import check_memory
from kvfold.requests import Flag, Model, Place, Several, option

PERPLEXITY_WINDOW, PERPLEXITY_TOKENS = 512, 8192  # of the text that models are scored on
GATE_STEPS = 4  # decode steps that are compared before anything is timed


@dataclass(frozen=True)
class ModelRequest(TimedRequest):
    """Every combination of models, contexts and batches, each with every implementation.

    Attributes:
        paths: folders, hub names or GGUF files. dtypes: of kvfold's caches.
        tokens: decode steps per sample. text: file the prompt is taken from, or None for random
            tokens. mha: see ``checkpoint.repeated``.

    Raises:
        InputError: for what cannot be measured.
    """

    command = "bench model"

    paths: Sequence[str] = option("PATH", Several(Model()), metavar="PATH...")
    contexts: Sequence[int] = option("--context", Wholes(CONTEXT), (512,), "Tokens; comma list.")
    batches: Sequence[int] = option("--batch", Wholes(BATCH), (1,), "Sequences; comma list.")
    dtypes: Sequence[str] = option(
        "--dtype",
        DTYPES,
        USUAL_DTYPES,
        "Of kvfold's caches, as for `bench attention`; or none.",
    )
    tokens: int = option("--tokens", STEPS, 16, "Decode steps per sample.")
    text: str | None = option("--text", Place(), None, "Prompt.  [default: random tokens]")
    mha: bool = option(
        "--mha",
        Flag(),
        False,
        "Also the first PATH as MHA, the same function with a KV head for every query head.",
    )
    perplexity: str | None = option(
        "--perplexity", Place(), None, "Every model's perplexity on this text, too."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fill(paths=tuple(dict.fromkeys(self.paths)))
        if not self.paths:
            raise InputError("no model given", "name one or more folders")
        check_cases(len(self.contexts) * len(self.batches))
        if self.text is not None:
            from kvfold.quality.text import read_texts

            read_texts([self.text], max(self.contexts))
        if self.perplexity is not None:
            from kvfold.quality.text import read_texts

            read_texts([self.perplexity], PERPLEXITY_WINDOW)
        for path in self.paths:
            self._check_model(path)
        if self.mha and Path(self.paths[0]).expanduser().is_dir():
            check_heads(open_checkpoint(self.paths[0]))
        needed = self.working_set + sum(self._memory(path) for path in self.paths)
        needed += self._mha_memory()
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
        per_token = describe(read_config(folder)).kv_bytes_per_token()
        return weights + (1 + len(self.dtypes)) * tokens * per_token

    def _mha_memory(self) -> int:
        """The same of the first model as MHA, whose cache is as much larger as its KV heads."""
        folder = Path(self.paths[0]).expanduser()
        if not self.mha or is_gguf(self.paths[0]) or not folder.exists():
            return 0
        first = describe(read_config(folder)).layers[0]
        return self._memory(self.paths[0]) * first.num_heads // max(1, first.num_kv_heads)

    def _check_model(self, path: str) -> None:
        if is_gguf(path):
            summarize(Path(path).expanduser())
            return
        config: dict[str, Any] = peek_config(path)
        if Path(path).expanduser().exists():
            open_weights(path)
        positions = learned_positions(config)
        if positions is not None and max(self.contexts) + self.steps > positions:
            raise InputError(
                f"{path} has {positions} positions; --context {max(self.contexts)} and "
                f"{self.steps} decode steps need {max(self.contexts) + self.steps}",
                "a shorter --context, fewer --rounds or fewer --tokens",
            )
