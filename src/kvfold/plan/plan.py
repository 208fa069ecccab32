"""``kvfold plan``: options side by side, and which one to take."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvfold.arch.target import Latent
from kvfold.arguments import choice, several
from kvfold.errors import InputError
from kvfold.geometry import divisors
from kvfold.numbers import BATCH, BUDGET, CONTEXT, GPUS, HEADS, Wholes
from kvfold.plan.evidence import cache_risk, evict_risk, heads_risk, latent_risk, select_risk
from kvfold.plan.hardware import Hardware
from kvfold.plan.model import Model
from kvfold.plan.roofline import (
    KV_BITS,
    Bound,
    Load,
    Memory,
    decode_step,
    kv_bytes_per_token,
    largest,
    memory,
    prefill,
)

USABLE = 0.9  # of a machine's memory; the rest is the runtime's


@dataclass(frozen=True)
class Option:
    """One number of KV heads, or one latent, in one cache format.

    Attributes:
        kv_heads: 1 for a latent, which is the key of all heads. latent: as ``160+32``.
        kv_numbers: that a token adds to the cache, over all layers and GPUs.
        tokens_per_second: of the whole batch, at most. largest_context: at the asked batch;
            largest_batch: at the asked context; 0 where not even one fits.
        expected: seconds of a decoding step by measuring some of it, where that was asked for.
    """

    kv_heads: int
    kv_dtype: str
    kv_numbers: int
    kv_bytes_per_token: float
    memory: Memory
    fits: bool
    decode: Bound
    prefill: Bound
    tokens_per_second: float
    largest_context: int
    largest_batch: int
    expected: float | None = None
    latent: str | None = None

    @property
    def label(self) -> str:
        """In sentences."""
        if self.latent is not None:
            return f"a latent of {self.latent} numbers"
        return f"{self.kv_heads} KV head{'s' if self.kv_heads > 1 else ''}"

    @property
    def asked(self) -> str:
        """As an option of ``kvfold convert``."""
        return f"--kv-heads {self.kv_heads}" if self.latent is None else f"--latent {self.latent}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


@dataclass(frozen=True)
class Recommendation:
    """The option to take, and why."""

    option: Option
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What was asked, every option, and the one to take."""

    model: Model
    load: Load
    hardware: Hardware
    options: tuple[Option, ...]
    recommendation: Recommendation

    def as_dict(self) -> dict[str, Any]:
        model = {**asdict(self.model), "layers": self.model.kinds}
        return {
            "model": model,
            "load": asdict(self.load),
            "hardware": asdict(self.hardware),
            "options": [option.as_dict() for option in self.options],
            "recommendation": {
                "kv_heads": self.recommendation.option.kv_heads,
                "latent": self.recommendation.option.latent,
                "kv_dtype": self.recommendation.option.kv_dtype,
                "reasons": list(self.recommendation.reasons),
            },
        }


def make_plan(
    model: Model,
    load: Load,
    hardware: Hardware,
    kv_heads: Sequence[int] | None = None,
    kv_dtypes: Sequence[str] = ("bf16", "int8", "int4"),
    expect: Callable[[int, Load], float] | None = None,
    latents: Sequence[Latent] = (),
    config: Mapping[str, Any] | None = None,
) -> Plan:
    """Work out every option.

    Args:
        kv_heads: to compare; by default the model's own and up to three it can be folded to.
        latents: to compare beside them. config: the model's, which latents need.
        expect: gives seconds of a decoding step with so many KV heads, as
            ``kvfold.bench.probe.Prober.step`` does; asked for options that fit.

    Raises:
        InputError: for numbers of heads or latents the model cannot have, or unknown formats.
        UnsupportedError: for latents of a model whose family cannot be stored with them.
    """
    heads = _checked_heads(model, kv_heads)
    if latents and not model.foldable:
        raise InputError(f"{model.name} caches latent vectors (MLA) already", "leave --latent out")
    kv_dtypes = several(kv_dtypes, "--kv-dtype", lambda value, name: choice(value, name, KV_BITS))
    if not kv_dtypes:
        raise InputError("--kv-dtype is empty", f"choose among {', '.join(KV_BITS)}")
    CONTEXT.check(load.context, "--context")
    BATCH.check(load.batch, "--batch")
    GPUS.check(load.gpus, "--gpus")
    if load.select is not None:
        BUDGET.check(load.select, "--select")
    if load.evict is not None:
        BUDGET.check(load.evict, "--evict")
    kinds: list[tuple[Model, Latent | None]] = [(model.with_kv_heads(n), None) for n in heads]
    kinds += [(model.with_latent(latent, config or {}), latent) for latent in latents]
    options = tuple(
        _option(kind, latent, replace(load, kv_dtype=kv_dtype), hardware)
        for kind, latent in kinds
        for kv_dtype in kv_dtypes
    )
    if expect is not None:
        options = tuple(_expected(option, load, expect) for option in options)
    return Plan(model, load, hardware, options, recommend(model, load, options))


def _checked_heads(model: Model, wanted: Sequence[int] | None) -> list[int]:
    own = model.num_kv_heads
    if not model.foldable:
        if wanted and list(wanted) != [own]:
            raise InputError(
                f"{model.name} caches latent vectors (MLA); it has no KV heads to choose",
                "leave --kv-heads out",
            )
        return [own]
    allowed = divisors(own)
    if wanted is None:
        usual = [count for count in (own, model.num_heads // 4, 8, own // 2, own // 4, 1)
                 if count in allowed]  # fmt: skip
        return sorted(set(usual), reverse=True)[:4]
    for count in Wholes(HEADS).check(wanted, "--kv-heads"):
        if count not in allowed:
            raise InputError(
                f"--kv-heads {count}: {model.name} has {own}, which it does not divide",
                f"choose among {', '.join(map(str, allowed))}",
            )
    return list(wanted)


def _option(model: Model, latent: Latent | None, load: Load, hardware: Hardware) -> Option:
    found = memory(model, load)
    room = USABLE * hardware.memory
    step = decode_step(model, load, hardware)

    def context_fits(context: int) -> bool:
        return memory(model, replace(load, context=context)).total <= room

    def batch_fits(batch: int) -> bool:
        return memory(model, replace(load, batch=batch)).total <= room

    return Option(
        kv_heads=model.num_kv_heads if latent is None else 1,
        kv_dtype=load.kv_dtype,
        kv_numbers=sum(layer.kv_numbers() for layer in model.layers),
        kv_bytes_per_token=kv_bytes_per_token(model, load.kv_dtype, load.gpus),
        memory=found,
        fits=found.total <= room,
        decode=step,
        prefill=prefill(model, load, hardware),
        tokens_per_second=load.batch / step.seconds,
        largest_context=largest(context_fits),
        largest_batch=largest(batch_fits),
        latent=None if latent is None else latent.words,
    )


def _expected(option: Option, load: Load, expect: Callable[[int, Load], float]) -> Option:
    if not option.fits or option.latent is not None:
        return option
    return replace(
        option, expected=expect(option.kv_heads, replace(load, kv_dtype=option.kv_dtype))
    )


def recommend(model: Model, load: Load, options: Sequence[Option]) -> Recommendation:
    """The mildest option that fits and whose cache costs no more to read than the weights.

    Mildest: the cache format before the heads, because what formats cost in quality is far less
    (``evidence``); of heads and latents, what keeps more numbers. If none reads so little, the
    fastest that fits; if none fits, the smallest.
    """
    mild = sorted(options, key=lambda o: (-o.kv_numbers, -o.kv_heads, -KV_BITS[o.kv_dtype]))
    fitting = [option for option in mild if option.fits]
    light = [o for o in fitting if o.memory.kv_cache <= o.memory.weights]
    if light:
        chosen = light[0]
        why = "its cache takes no more of a step than the weights do; less would gain little"
    elif fitting:
        chosen = max(fitting, key=lambda o: o.tokens_per_second)
        why = "it is the fastest that fits; even its cache takes more of a step than the weights"
    else:
        chosen = min(options, key=lambda o: o.memory.total)
        why = "nothing fits; this comes nearest"
    if chosen.latent is None:
        risk = f"heads: {heads_risk(model.num_kv_heads / chosen.kv_heads)}"
    else:
        risk = f"latent: {latent_risk()}"
    reasons = [why, f"quality, {risk}"]
    reasons.append(f"quality, cache: {cache_risk(chosen.kv_dtype)}")
    if load.select is not None:
        reasons.append(f"quality, selection: {select_risk(load.select)}")
    if load.evict is not None:
        reasons.append(f"quality, eviction: {evict_risk(load.evict)}")
    if model.foldable:
        quarter = model.num_heads // 4
        reasons.append(
            f"usual practice is a quarter of the query heads ({quarter or 1} here) or 8 KV heads, "
            "trained so from the start (Llama 3, Qwen2.5, Mistral)"
        )
    if load.gpus > 1 and chosen.latent is not None:
        reasons.append(f"{load.gpus} GPUs each keep a copy of the latent: it is not shared out")
    elif load.gpus > chosen.kv_heads and model.foldable:
        reasons.append(
            f"{load.gpus} GPUs share {chosen.kv_heads} KV heads: each keeps a copy, so fewer heads "
            "than GPUs save nothing more"
        )
    if chosen.latent is not None or chosen.kv_heads < model.num_kv_heads:
        reasons.append(f"next: kvfold convert SRC OUT {chosen.asked}, then kvfold eval and heal")
    return Recommendation(chosen, tuple(reasons))
