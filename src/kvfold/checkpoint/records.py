"""What kvfold writes about its runs, as far as it reads it again. No torch.

``kvfold.json`` (of ``convert`` and ``heal``), ``demo.json``, ``healing.jsonl``, and the reports of
layers that an interrupted run has finished.
"""

from typing import Annotated, Any, NotRequired

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from typing_extensions import TypedDict

from kvfold.arch.config import MOST_LAYERS, Heads
from kvfold.checkpoint.inputs import Prints
from kvfold.documents import MEGABYTE, Document, open_ended
from kvfold.errors import InputError

_RUN = "is the run complete? make it again"
Number = Annotated[float, Ge(-1e300), Le(1e300)]
Seconds = Annotated[float, Ge(0), Le(1e12)]
Count = Annotated[int, Ge(0), Le(1 << 60)]
Bytes = Annotated[int, Ge(1), Le(1 << 50)]
LayerNumber = Annotated[int, Ge(0), Le(MOST_LAYERS)]


@open_ended
class Heads2(TypedDict):
    """KV heads before and after."""

    source: Heads
    folded: Heads


@open_ended
class Bytes2(TypedDict):
    """Bytes of cache per token before and after."""

    source: Bytes
    folded: Bytes


@open_ended
class Geometry(TypedDict):
    """Of a record: see ``fold.record.geometry_record``."""

    num_heads: Heads
    num_kv_heads: Heads2
    kv_bytes_per_token_16bit: Bytes2


@open_ended
class Named(TypedDict):
    """The source."""

    name: str


@open_ended
class Calibration(TypedDict):
    """The text that was used."""

    tokens: Count
    texts: list[str]


@open_ended
class FitStage(TypedDict):
    """What one stage of fitting gained."""

    stage: str
    error_before: Number
    error_after: Number


@open_ended
class LayerRow(TypedDict):
    """What was done to a layer."""

    layer: LayerNumber
    captured_value: NotRequired[Number]
    captured_key: NotRequired[Number]
    stages: Annotated[list[FitStage], MaxLen(5)]
    drift: NotRequired[Number | None]


@open_ended
class StageMeans(TypedDict):
    """What a stage of fitting gained, mean over layers."""

    error_before: Number
    error_after: Number


@open_ended
class Summary(TypedDict, total=False):
    """Means over layers; empty where nothing was folded."""

    captured_value: Number
    captured_key: Number
    stages: dict[str, StageMeans]


@open_ended
class FoldRun(TypedDict):
    """How long, how large."""

    seconds: Seconds
    peak_memory_bytes: Count


@open_ended
class HeldOut(TypedDict):
    """What a fitted model lost on calibration text that was held out, per token.

    Errors are standard errors over windows.
    """

    tokens: Count
    source_nll: Number
    nats_lost: Number
    nats_lost_error: Number
    kl: Number
    kl_error: Number
    top1: Number


@open_ended
class TriedRow(TypedDict):
    """What one number of KV heads lost, folded by one fit; see ``fold.search``."""

    target: str
    fit: str
    held_out: HeldOut


@open_ended
class FoldRecord(TypedDict):
    """A ``kvfold.json`` that ``convert`` wrote."""

    command: str
    source: Named
    geometry: Geometry
    method: str
    fit: str
    calibration: NotRequired[Calibration | None]
    warnings: NotRequired[list[str]]
    summary: NotRequired[Summary]
    held_out: NotRequired[HeldOut]
    layers: Annotated[list[LayerRow], MaxLen(MOST_LAYERS)]
    run: FoldRun


@open_ended
class QualityRow(TypedDict):
    """One model on one text; see ``quality.scores.Quality``."""

    text: str
    name: str
    perplexity: Number
    perplexity_error: Number
    nats_lost: Number
    nats_lost_error: Number
    kl: Number
    kl_error: Number
    kl_p95: Number
    kl_p99: Number
    top1: Number


@open_ended
class WholeQuality(QualityRow):
    """The same with every number there is."""

    tokens: Count
    nll: Number
    ratio: Number
    ratio_error: Number
    kv_bytes_per_token: Count


@open_ended
class NeedleRow(TypedDict):
    """Pass keys of one length and depth; see ``quality.needle.Retrieval``."""

    name: str
    tokens: Count
    depth: Number
    found: Number
    nats: Number


@open_ended
class Evaluated(TypedDict):
    """What ``eval --json`` prints of texts and of more."""

    texts: Annotated[list[WholeQuality], MaxLen(10_000)]
    needles: NotRequired[Annotated[list[NeedleRow], MaxLen(10_000)]]


@open_ended
class HealAsked(TypedDict):
    """What healing was asked for."""

    stages: list[str]
    tokens: Count
    train: str
    lora_rank: Count
    lr: Number
    lr_rest: Number


@open_ended
class HealedLayers(TypedDict):
    """What fitting layer by layer gained."""

    summary: dict[str, StageMeans]


@open_ended
class HealRun(TypedDict):
    """How long, on what."""

    seconds: Seconds
    peak_memory_bytes: NotRequired[Count]
    device: str
    processes: Count


@open_ended
class Kept(TypedDict):
    """How much of what training changed was kept, and the KL by what was tried."""

    share: Number
    kl: dict[str, Number]


@open_ended
class HealRecord(TypedDict):
    """The entry ``heal`` of a ``kvfold.json``."""

    command: str
    request: HealAsked
    steps: Count
    local: NotRequired[HealedLayers]
    kept: NotRequired[Kept]
    quality: Annotated[list[QualityRow], MaxLen(10_000)]
    run: HealRun


@open_ended
class Record(TypedDict, total=False):
    """Any ``kvfold.json``: the keys that every reader may look at."""

    command: str
    fit: str
    geometry: dict[str, Any]
    heal: dict[str, Any]


@open_ended
class DemoModel(TypedDict):
    """A row of ``demo.json``."""

    method: str
    kv_heads: Heads
    latent: NotRequired[str | None]
    quality: dict[str, Any]


@open_ended
class DemoRecord(TypedDict):
    """A ``demo.json``."""

    seed: int
    rows: Annotated[list[DemoModel], MaxLen(1000)]


@open_ended
class MetricsRow(TypedDict):
    """A line of ``healing.jsonl``; held-out texts have keys of their own."""

    step: Count
    tokens: Count
    kl: NotRequired[Number]


@open_ended
class KeptReport(TypedDict):
    """What folding did to a layer that is kept; see ``fold.layer.LayerReport``."""

    layer: LayerNumber
    method: str
    groups: Annotated[list[Annotated[list[LayerNumber], MinLen(1)]], MinLen(1)]
    captured_value: Number
    captured_key: Number
    constant_error: NotRequired[Number]


class KeptLayer(TypedDict):
    """A layer that an interrupted run has finished."""

    report: KeptReport | None
    stages: Annotated[list[FitStage], MaxLen(5)]
    drift: Number | None
    held_out: HeldOut | None


class ComparedRow(TypedDict):
    """A target, how far its attention is from the source's, and what that costs at the end."""

    target: str
    attention_error: Annotated[dict[str, Number], MinLen(1), MaxLen(10)]  # by tokens of a window
    kl: Annotated[dict[str, Number], MinLen(1), MaxLen(10)]


@open_ended
class StoredRequest(TypedDict):
    """A ``request.json``."""

    inputs: Prints
    folder: int


@open_ended
class Mark(TypedDict):
    """For which OUT a working folder is."""

    out: NotRequired[str]


class StoredSpread(TypedDict):
    """See ``bench.timing.Spread``."""

    median: Annotated[float, Gt(0), Le(1e12)]
    low: Seconds
    high: Seconds
    samples: Annotated[list[Number], MaxLen(1_000_000)]


RECORDS = Document(Record, _RUN, largest=64 * MEGABYTE, surrogates=True)
# What a run was asked, and what everything that it reads was then.
REQUESTS = Document(
    StoredRequest,
    "--force instead of --resume starts over",
    largest=64 * MEGABYTE,
    error=InputError,
    surrogates=True,
)
MARKS = Document(Mark, "move it away, or choose another OUT", error=InputError, surrogates=True)
FOLDING = Document(FoldRecord, _RUN)
HEALING = Document(HealRecord, _RUN)
QUALITY = Document(QualityRow, _RUN)
QUALITIES = Document(list[WholeQuality], _RUN)
EVALUATION = Document(Evaluated, "give what `kvfold eval --json` printed", error=InputError)
DEMO_RECORD = Document(DemoRecord, _RUN)
METRICS_ROW = Document(MetricsRow, _RUN, largest=MEGABYTE)
TRIED = Document(list[TriedRow], "--force instead of --resume starts over")
COMPARED = Document(list[ComparedRow], "--force instead of --resume starts over")
OWN_TEXT = Document(
    list[list[Count]], "--force instead of --resume starts over", largest=256 * MEGABYTE
)
KEPT = Document(KeptLayer, "--force instead of --resume starts over", largest=64 * MEGABYTE)
