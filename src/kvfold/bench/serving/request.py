"""What ``kvfold bench serve`` measures, checked before an engine is started. No torch."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfold.arch.decoder import Decoder, describe
from kvfold.bench.cases import TimedRequest, check_cases
from kvfold.bench.serving.engine import check_python
from kvfold.checkpoint.source import open_weights
from kvfold.errors import InputError
from kvfold.numbers import BATCH, BYTES, CONTEXT, LIMIT, OUTPUT, ROUNDS, STARTS, Wholes
from kvfold.ops.formats import format_of
from kvfold.plan.source import open_model, read_config
from kvfold.quality.device import check_memory
from kvfold.requests import Choice, Flag, Listed, Model, Place, Several, option

VLLM, KVFOLD = "vLLM", "kvfold"
# By vLLM's names. What is as wide as the model is called auto there.
CACHES = {"bf16": "auto", "fp16": "auto", "fp32": "auto", "fp8": "fp8",
          "int8": "int8_per_token_head", "int4": "int4_per_token_head"}  # fmt: skip
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_VLLMS = ("fp8",)  # formats that vLLM's own attention has too, besides the model's own
_BLOCK = 128  # tokens of vLLM's pages on a CPU
_SPARE = 1.1  # of a cache's memory: packed pages may be a little larger than their numbers
_PROCESS = 5 << 28  # bytes of a vLLM process without weights and cache


@dataclass(frozen=True)
class Server:
    """One engine to be: a model, whose attention, and the format of its cache."""

    path: str
    attention: str
    cache: str

    @property
    def implementation(self) -> str:
        return f"{self.attention} {self.cache}"


@dataclass(frozen=True)
class ServeRequest(TimedRequest):
    """Every combination of checkpoints, cache formats, contexts and concurrencies.

    Attributes:
        paths: folders. against: whose own attention to compare with: vLLM's, or nobody's.
        requests: of each case and round, or None for as many as are served at once.
        caches: of kvfold's attention. memory: of each engine's cache, None for what the largest
            case needs.
        python: that has vLLM, or None for this one.
        computed: whether prompts are computed before decoding is measured, or made up.
        random_weights: whether weights are made up, so that a config.json is enough.
        starts: of each engine, one after the other with nothing beside it, or None for engines
            that are all there and take turns. Starts of one engine differ, steps within one do not.

    Raises:
        InputError: for what cannot be measured.
    """

    command = "bench serve"

    paths: Sequence[str] = option("PATH", Several(Model()), metavar="PATH...")
    against: Sequence[str] = option(
        "--against",
        Listed(Choice(("vllm",)), none=True),
        ("vllm",),
        "vllm's own attention; or none.",
    )
    contexts: Sequence[int] = option(
        "--context", Wholes(CONTEXT), (512, 4096), "Tokens of each prompt; comma list."
    )
    concurrencies: Sequence[int] = option(
        "--concurrency", Wholes(BATCH), (1, 4, 16), "Requests at once; comma list."
    )
    requests: int | None = option(
        "--requests", LIMIT, None, "At least so many per case and round.  [default: --concurrency]"
    )
    output: int = option("--output", OUTPUT, 64, "Tokens that each request decodes.")
    caches: Sequence[str] = option(
        "--cache",
        Listed(Choice(CACHES)),
        ("bf16", "int8", "int4"),
        f"Formats of kvfold's cache: {', '.join(CACHES)}.",
    )
    dtype: str = option("--dtype", Choice(DTYPES), "bfloat16", "Of weights and arithmetic.")
    memory: int | None = option(
        "--memory", BYTES, None, "Of each engine's cache.  [default: for the largest case]"
    )
    python: str | None = option(
        "--python", Place(), None, "A Python that has vLLM.  [default: this one]"
    )
    eager: bool = option("--eager", Flag(), False, "Do not compile the models: starts faster.")
    computed: bool = option(
        "--computed", Flag(), False, "Compute every prompt, also where decoding is measured."
    )
    random_weights: bool = option(
        "--random-weights", Flag(), False, "Make weights up: a config.json is enough."
    )
    rounds: int = option("--rounds", ROUNDS, 5, "Samples of each competitor, in turn.", shared=True)
    starts: int | None = option(
        "--starts",
        STARTS,
        None,
        "Start each engine so often, alone: a sample is a start.  [default: all at once, in turn]",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fill(paths=tuple(dict.fromkeys(self.paths)))
        if not self.paths:
            raise InputError("no model given", "name one or more folders")
        for cache in self.caches:
            if CACHES[cache] == "auto" and cache != DTYPES[self.dtype]:
                raise InputError(
                    f"--cache {cache} with --dtype {self.dtype}: vLLM keeps {DTYPES[self.dtype]}, "
                    "or fewer bits",
                    f"--cache {DTYPES[self.dtype]}",
                )
        check_cases(len(self.contexts) * len(self.concurrencies))
        for path in self.paths:
            self._check_model(path)
        self._check_memory()
        check_python(self.interpreter, plugin=True)

    @property
    def interpreter(self) -> str:
        """The Python that runs vLLM."""
        return self.python or sys.executable

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.contexts) + self.output

    def groups(self) -> Iterator[list[Server]]:
        """Engines that are compared: one group per format, with vLLM's own in every group.

        Those that are alone when they are measured make one group.
        """
        together = self._together()
        if self.starts is None:
            yield from together
        else:
            yield list(dict.fromkeys(server for group in together for server in group))

    def _together(self) -> Iterator[list[Server]]:
        own = DTYPES[self.dtype]
        for cache in self.caches:
            group = []
            for path in self.paths:
                theirs = [own, *(name for name in _VLLMS if name == cache)] if self.against else []
                group += [*(Server(path, VLLM, name) for name in theirs)]
                group.append(Server(path, KVFOLD, cache))
            yield group

    def cache_bytes(self) -> int:
        """Bytes of each engine's cache."""
        if self.memory is not None:
            return self.memory
        tokens = max(self.concurrencies) * _whole_blocks(self.longest) + _BLOCK
        return int(_SPARE * tokens * max(map(self._bytes_per_token, self.paths)))

    def weight_bytes(self, path: str) -> int:
        """Bytes of weights that an engine holds."""
        return open_model(path).parameters * self._itemsize

    def read_bytes(self, path: str) -> int:
        """Bytes of weights that a step reads: of the embeddings only as an output."""
        found = open_model(path)
        tied = describe(read_config(path)).tied
        table = 0 if tied else found.vocab_size * found.hidden_size
        return (found.parameters - table) * self._itemsize

    @property
    def _itemsize(self) -> int:
        return format_of(DTYPES[self.dtype]).bits // 8

    def _bytes_per_token(self, path: str) -> int:
        return decoder_of(path).kv_bytes_per_token(8 * self._itemsize)

    def _check_model(self, path: str) -> None:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"{path}: expected a folder, as Hugging Face or kvfold writes it",
                "download or convert the model first",
            )
        decoder = decoder_of(path)
        if not self.random_weights:
            open_weights(path)
        most = decoder.max_context
        if most is not None and self.longest > most:
            raise InputError(
                f"{path} has {most:,} positions; --context {max(self.contexts)} and --output "
                f"{self.output} need {self.longest:,}",
                "a shorter --context or --output",
            )
        one = _whole_blocks(self.longest) * self._bytes_per_token(path)
        if self.memory is not None and self.memory < one:
            raise InputError(
                f"--memory {self.memory} is less than a sequence of {self.longest:,} tokens "
                f"needs in {path} ({one:,})",
                "more --memory, or a shorter --context",
            )

    def _check_memory(self) -> None:
        """A group's engines are there at once, unless each is started alone."""
        each = _PROCESS + self.cache_bytes()
        most = max if self.starts else sum
        needed = max(
            most(each + self.weight_bytes(server.path) for server in group)
            for group in self.groups()
        )
        check_memory(
            needed + self.working_set,
            "fewer models at a time, a smaller --concurrency or --memory need less",
        )


def decoder_of(path: str) -> Decoder:
    """What a folder's config says."""
    return describe(read_config(path))


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // _BLOCK) * _BLOCK
