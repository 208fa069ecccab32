"""``kvfold plan``: options side by side, and which one to take."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvfold.arguments import choice, several
from kvfold.errors import InputError
from kvfold.geometry import divisors
from kvfold.numbers import BATCH, CONTEXT, GPUS, HEADS, Wholes
from kvfold.plan.evidence import cache_risk, heads_risk
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
    """One number of KV heads in one cache format.

    Attributes:
        tokens_per_second: of the whole batch, at most. largest_context: at the asked batch;
            largest_batch: at the asked context; 0 where not even one fits.
        expected: seconds of a decoding step by measuring some of it, where that was asked for.
    """

    kv_heads: int
    kv_dtype: str
    kv_bytes_per_token: float
    memory: Memory
    fits: bool
    decode: Bound
    prefill: Bound
    tokens_per_second: float
    largest_context: int
    largest_batch: int
    expected: float | None = None

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
) -> Plan:
    """Work out every option.

    Args:
        kv_heads: to compare; by default the model's own and up to three it can be folded to.
        expect: gives seconds of a decoding step with so many KV heads, as
            ``kvfold.bench.probe.Prober.step`` does; asked for options that fit.

    Raises:
        InputError: for numbers of heads the model cannot have, or unknown formats.
    """
    heads = _checked_heads(model, kv_heads)
    kv_dtypes = several(kv_dtypes, "--kv-dtype", lambda value, name: choice(value, name, KV_BITS))
    if not kv_dtypes:
        raise InputError("--kv-dtype is empty", f"choose among {', '.join(KV_BITS)}")
    CONTEXT.check(load.context, "--context")
    BATCH.check(load.batch, "--batch")
    GPUS.check(load.gpus, "--gpus")
    options = tuple(
        _option(model.with_kv_heads(count), replace(load, kv_dtype=kv_dtype), hardware)
        for count in heads
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


def _option(model: Model, load: Load, hardware: Hardware) -> Option:
    found = memory(model, load)
    room = USABLE * hardware.memory
    step = decode_step(model, load, hardware)

    def context_fits(context: int) -> bool:
        return memory(model, replace(load, context=context)).total <= room

    def batch_fits(batch: int) -> bool:
        return memory(model, replace(load, batch=batch)).total <= room

    return Option(
        kv_heads=model.num_kv_heads,
        kv_dtype=load.kv_dtype,
        kv_bytes_per_token=kv_bytes_per_token(model, load.kv_dtype, load.gpus),
        memory=found,
        fits=found.total <= room,
        decode=step,
        prefill=prefill(model, load, hardware),
        tokens_per_second=load.batch / step.seconds,
        largest_context=largest(context_fits),
        largest_batch=largest(batch_fits),
    )


def _expected(option: Option, load: Load, expect: Callable[[int, Load], float]) -> Option:
    if not option.fits:
        return option
    return replace(
        option, expected=expect(option.kv_heads, replace(load, kv_dtype=option.kv_dtype))
    )


def recommend(model: Model, load: Load, options: Sequence[Option]) -> Recommendation:
    """The mildest option that fits and whose cache costs no more to read than the weights.

    Mildest: the cache format before the heads, because what formats cost in quality is far less
    (``evidence``). If none reads so little, the fastest that fits; if none fits, the smallest.
    """
    mild = sorted(options, key=lambda o: (-o.kv_heads, -KV_BITS[o.kv_dtype]))
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
    factor = model.num_kv_heads / chosen.kv_heads
    reasons = [why, f"quality, heads: {heads_risk(factor)}"]
    reasons.append(f"quality, cache: {cache_risk(chosen.kv_dtype)}")
    if model.foldable:
        quarter = model.num_heads // 4
        reasons.append(
            f"usual practice is a quarter of the query heads ({quarter or 1} here) or 8 KV heads, "
            "trained so from the start (Llama 3, Qwen2.5, Mistral)"
        )
    if load.gpus > chosen.kv_heads and model.foldable:
        reasons.append(
            f"{load.gpus} GPUs share {chosen.kv_heads} KV heads: each keeps a copy, so fewer heads "
            "than GPUs save nothing more"
        )
    if factor > 1:
        reasons.append(
            f"next: kvfold convert SRC OUT --kv-heads {chosen.kv_heads}, then kvfold eval and heal"
        )
    return Recommendation(chosen, tuple(reasons))
