"""Whole models: time to the first token and per token after it, all in one alternation."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from kvfold.arch.config import plain_config
from kvfold.arch.decoder import Decoder, describe
from kvfold.arch.layers import RECURRENT, Layer
from kvfold.bench.buffers import read, threads
from kvfold.bench.cases import dtype_of
from kvfold.bench.contestant import (
    LAST,
    NATIVE,
    OURS,
    PLAIN,
    WIDE,
    Contestant,
    Model,
    ModelVerdict,
    Walk,
    judge,
    twin,
    walk,
    wide,
)
from kvfold.bench.model_cases import (
    GATE_STEPS,
    PERPLEXITY_TOKENS,
    PERPLEXITY_WINDOW,
    ModelRequest,
)
from kvfold.bench.results import OK, SKIPPED, WRONG, Results, Row
from kvfold.bench.this_machine import described, is_cold
from kvfold.bench.timing import Timing, measure, ratio
from kvfold.checkpoint.pretrained import built_model, load_tokenizer
from kvfold.checkpoint.repeated import as_mha
from kvfold.checkpoint.source import Checkpoint, TensorDict
from kvfold.errors import UnsupportedError
from kvfold.ops.formats import format_of
from kvfold.progress import Progress, no_progress
from kvfold.quality.run import load_model, local_folder
from kvfold.quality.scores import Quality, compare
from kvfold.quality.text import read_texts, token_windows
from kvfold.record import command_line

_READ = "read"


@dataclass(frozen=True)
class Loaded:
    """A model once for every attention implementation, weights shared."""

    name: str
    folder: Path
    decoder: Decoder
    by_implementation: dict[str, Model]
    quality: Quality | None = None

    @property
    def native(self) -> Model:
        return self.by_implementation[NATIVE]

    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step must read: of the embeddings only as an output."""
        model = self.native
        total = sum(p.nbytes for p in model.parameters())
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head is not None and head.weight is table.weight
        return int(total if tied else total - table.weight.nbytes)


@dataclass
class Entry:
    """One row in the making.

    Attributes:
        dtype: of kvfold's cache, or None for transformers' own.
        first_token: seconds of the prefill.
    """

    loaded: Loaded
    dtype: str | None
    contestant: Contestant
    verdict: ModelVerdict | None = None
    reason: str = ""
    first_token: float = 0.0
    kv_tokens: int = 0
    kv_bytes: int = 0

    @property
    def implementation(self) -> str:
        return NATIVE if self.dtype is None else f"kvfold {self.dtype}"

    @property
    def key(self) -> str:
        return f"{self.loaded.name} {self.loaded.folder} {self.implementation}"

    @property
    def status(self) -> str:
        if self.reason:
            return SKIPPED
        return OK if self.verdict is None or self.verdict.passed else WRONG


def run_model(request: ModelRequest, *, progress: Progress = no_progress) -> Results:
    """Measure every model with every implementation, side by side.

    >>> run_model(ModelRequest(["folder"], contexts=[512]))  # doctest: +SKIP
    """
    rows, cases = list[Row](), list(request.cases())
    with ExitStack() as stack, torch.no_grad():
        count = stack.enter_context(threads(request.threads))
        models = [_load(path, stack) for path in request.paths]
        if request.mha:
            models.insert(0, _as_mha(models[0]))
        if request.perplexity is not None:
            models = _scored(models, request.perplexity, progress)
        for index, (context, batch) in enumerate(cases):
            progress("cases", index, len(cases))
            rows += _run_case(models, request, context, batch)
        progress("cases", len(cases), len(cases))
        return Results(command_line(request, brief=True), described(count), tuple(rows))


def _load(path: str, stack: ExitStack) -> Loaded:
    import kvfold.transformers

    kvfold.transformers.enable()
    folder = local_folder(path, stack)
    name = Path(path).name if Path(path).exists() else path
    return _loaded(name, folder, load_model(folder, "bfloat16", "cpu"))


def _loaded(name: str, folder: Path, model: Model) -> Loaded:
    twins = {name: twin(model, name) for name in (NATIVE, PLAIN, OURS)} | {WIDE: wide(model)}
    decoder = describe(plain_config(model.config.get_text_config(decoder=True)))
    return Loaded(name, folder, decoder, twins)


def _as_mha(loaded: Loaded) -> Loaded:
    """The same model with its KV heads repeated."""
    model = loaded.native
    source = Checkpoint(loaded.name, model.config.to_dict(), TensorDict(model.state_dict()))
    return _loaded(
        f"{loaded.name} as MHA", loaded.folder, built_model(*as_mha(source), model.dtype)
    )


def _scored(models: list[Loaded], text: str, progress: Progress) -> list[Loaded]:
    """With what each predicts of a text."""
    tokenizer = load_tokenizer(models[0].folder)
    words = read_texts([text], PERPLEXITY_WINDOW)
    windows = token_windows(tokenizer, words, PERPLEXITY_WINDOW, PERPLEXITY_TOKENS)
    found = compare([(model.name, model.native) for model in models], windows, text, progress)
    return [replace(model, quality=own) for model, own in zip(models, found, strict=True)]


def _run_case(models: list[Loaded], request: ModelRequest, context: int, batch: int) -> list[Row]:
    entries = [e for m in models for e in _entries(m, request, context, batch)]
    data = torch.ones(-(-request.working_set // 8), dtype=torch.int64)
    steps: dict[str, Callable[[], object]] = {
        e.key: e.contestant.step for e in entries if e.status == OK
    }
    # Reading takes as many turns a sample as decoding does.
    timings = measure(
        {_READ: lambda: read(data)} | steps, rounds=request.rounds, repeats=request.tokens
    )
    return [_row(e, entries[0], context, batch, timings, data.nbytes) for e in entries]


def _entries(loaded: Loaded, request: ModelRequest, context: int, batch: int) -> list[Entry]:
    """Prefill and judge every implementation; transformers' own is the measure of the others."""
    from transformers import DynamicCache

    prompt = _prompt(loaded, request, context, batch)
    native = loaded.native
    native(prompt[:, :8], use_cache=False)  # warm up
    own = Entry(loaded, None, Contestant(native, lambda: DynamicCache(config=native.config)))
    first = _prefill(own, prompt)
    path = walk(own.contestant, first, GATE_STEPS)
    again = cache(partial(_truth, loaded, prompt))
    return [own, *(_ours(loaded, dtype, prompt, path, again) for dtype in request.dtypes)]


def _truth(loaded: Loaded, prompt: torch.Tensor) -> torch.Tensor:
    """The prompt's last logits in float32."""
    model = loaded.by_implementation[WIDE]
    logits: torch.Tensor = model(prompt, use_cache=False, logits_to_keep=LAST).logits
    return logits


def _ours(
    loaded: Loaded,
    dtype: str,
    prompt: torch.Tensor,
    path: Walk,
    again: Callable[[], torch.Tensor],
) -> Entry:
    from kvfold.transformers import KVCache

    model = loaded.by_implementation[OURS]
    contestant = Contestant(model, lambda: KVCache(model.config, dtype=dtype_of(dtype)))
    entry = Entry(loaded, dtype, contestant)
    try:
        first = _prefill(entry, prompt)
        others = [loaded.by_implementation[name] for name in (WIDE, NATIVE, PLAIN)]
        entry.verdict = judge(contestant, first, path, others, again)
    except UnsupportedError as error:
        entry.reason = error.message
    return entry


def _prefill(entry: Entry, prompt: torch.Tensor) -> torch.Tensor:
    start = perf_counter()
    logits = entry.contestant.prefill(prompt)
    entry.first_token = perf_counter() - start
    entry.kv_bytes = entry.contestant.kv_bytes()
    entry.kv_tokens = prompt.numel()
    return logits


def _prompt(loaded: Loaded, request: ModelRequest, context: int, batch: int) -> torch.Tensor:
    """``[batch, context]``: random tokens, or windows of the text."""
    if request.text is None:
        generator = torch.Generator().manual_seed(0)
        size = loaded.native.config.get_text_config().vocab_size
        return torch.randint(size, (batch, context), generator=generator)
    text = read_texts([request.text], context)
    windows = token_windows(load_tokenizer(loaded.folder), text, context, batch * context)
    return windows[torch.arange(batch) % len(windows)]


def kv_bytes_expected(layers: Iterable[Layer], dtype: str | None, tokens: int) -> int:
    """Bytes that keys and values of so many tokens need, scales included, on paper.

    >>> kv_bytes_expected([Layer("full", 8, 2, 64, 64)] * 2, "int8", 10)
    5280
    """
    given = dtype_of(dtype or "bf16")
    k, v = (format_of(name) for name in (given if isinstance(given, tuple) else (given, given)))
    rows = 0
    for layer in layers:
        if layer.kind != RECURRENT:
            d, dv = layer.head_dim, layer.v_head_dim
            row = k.row_bytes(d) + v.row_bytes(dv) + 2 * (k.groups(d) + v.groups(dv))
            rows += layer.num_kv_heads * row
    return tokens * rows


def _sharing(loaded: Loaded) -> str:
    first = loaded.decoder.layers[0]
    if getattr(loaded.native.config, "kv_lora_rank", None):
        return "MLA"
    if first.num_kv_heads == first.num_heads:
        return "MHA"
    return "MQA" if first.num_kv_heads == 1 else "GQA"


def _row(
    entry: Entry,
    first: Entry,
    context: int,
    batch: int,
    timings: dict[str, Timing],
    read_bytes: int,
) -> Row:
    layers, verdict, read_time = entry.loaded.decoder.layers, entry.verdict, timings[_READ]
    expected = kv_bytes_expected(layers, entry.dtype, entry.kv_tokens)
    must_read = entry.loaded.weight_bytes() + expected
    values: dict[str, Any] = {
        "benchmark": "model",
        "case": {
            "model": entry.loaded.name,
            "num_heads": layers[0].num_heads,
            "num_kv_heads": layers[0].num_kv_heads,
            "context": context,
            "batch": batch,
        },
        "implementation": entry.implementation,
        "sharing": _sharing(entry.loaded),
        "status": entry.status,
        "reason": "" if entry.status == OK else entry.reason or (verdict and verdict.reason),
        "error": verdict.error if verdict else None,
        "allowed": verdict.allowed if verdict else None,
        "top1": verdict.top1 if verdict else None,
        "kv_bytes": entry.kv_bytes,
        "kv_bytes_expected": expected,
        "bytes": must_read,
        "bandwidth": read_bytes / read_time.median,
        "working_set": must_read,
        "cold": is_cold(must_read),
    }
    quality = entry.loaded.quality
    if quality is not None:
        values |= {"perplexity": quality.perplexity, "perplexity_error": quality.perplexity_error}
    own = timings.get(entry.key)
    if own is not None:
        values |= {
            "seconds": own,
            "first_token": Timing.of([entry.first_token]),
            "floor_fraction": ratio(read_time, own, must_read / read_bytes),
            "vs_first": ratio(timings[first.key], own),
        }
    return Row(**values)
