"""What kvfold has measured about quality: all that a recommendation may say about it.

Every number is one of ``benchmarks/README.md`` or ``LOG.md``, which have its command, machine and
date.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvfold.ops.formats import FORMATS

MODEL = "SmolLM2-135M"


@dataclass(frozen=True)
class Folded:
    """Nats per token lost by folding ``MODEL`` to a third of its KV heads, on two texts."""

    what: str
    similar: float
    other: float


FOLDED = (
    Folded("folded, calibrated on four kinds of text", 0.34, 0.33),
    Folded("then healed with 60,000 tokens of these", 0.25, 0.24),
    Folded("instead healed with 700,000 tokens of five kinds", 0.13, 0.17),
)

# Of the same model with a latent of half its cache.
LATENT = Folded("converted with the defaults of `kvfold convert`", 0.09, 0.29)
LATENT_LONG = Folded("at 4,096 tokens of context", 0.15, 0.33)

# Of steps that read a part of a bfloat16 cache at 8,000 tokens of context: nats of KL per token to
# those that read it all, on the worse of two texts.
SELECTED = {0.5: 0.0052, 0.25: 0.0154, 0.125: 0.0480}

# The same of caches that keep a part of the tokens, by attention.
EVICTED = {0.5: 0.003, 0.25: 0.0113, 0.125: 0.0378}

# Of an 8- or 4-bit cache against bfloat16, at 4,096 tokens of context, on the worse of two texts.
CACHES = {
    "int8": "KL 0.0009 nats per token",
    "fp8": "KL 0.0112 nats per token",
    "int4": "perplexity times 1.012",
}


def heads_risk(factor: float) -> str:
    """What is known of folding to ``1 / factor`` of the KV heads."""
    if factor == 1:
        return "none: the model stays as it is"
    known = "; ".join(
        f"{row.what}: {row.similar:.2f} nats per token lost on text like the calibration's, "
        f"{row.other:.2f} on other text"
        for row in FOLDED
    )
    relation = "the same factor" if factor == 3 else f"not a factor of {factor:g}"
    return f"measured is {MODEL} to a third of its heads ({relation}): {known}"


def latent_risk() -> str:
    """What is known of storing a model with a latent for all heads."""
    return (
        f"measured is {MODEL} with half of its cache (136+56): {LATENT.what}: "
        f"{LATENT.similar:.2f} nats per token lost on text like the calibration's, "
        f"{LATENT.other:.2f} on other text, {LATENT_LONG.similar:.2f} and {LATENT_LONG.other:.2f} "
        f"{LATENT_LONG.what}; with fewer rotary frequencies latents fail late; `kvfold eval` tells "
        "it of yours"
    )


def select_risk(share: float) -> str:
    """What is known of steps that read a part of the cache."""
    return _part_risk(share, SELECTED, "reading", "stands alone far away may be missed", "--select")


def evict_risk(share: float) -> str:
    """What is known of caches that keep a part of the tokens."""
    return _part_risk(share, EVICTED, "keeping", "is asked later may be forgotten", "--evict")


def _part_risk(share: float, known: Mapping[float, float], verb: str, risk: str, flag: str) -> str:
    found = ", ".join(f"{kl:.4f} {verb} {budget:.1%}" for budget, kl in known.items())
    near = "" if share in known else f" (not {share:.4g} of it)"
    return (
        f"measured is {MODEL} at 8,000 tokens of context{near}: KL {found}, in nats per token; "
        f"what {risk}: `kvfold eval --needle {flag}`"
    )


def cache_risk(kv_dtype: str) -> str:
    """What is known of a cache format."""
    if FORMATS[kv_dtype].plain:
        return "none beyond rounding"
    found = CACHES.get(kv_dtype)
    return f"measured on {MODEL} at 4,096 tokens: {found}" if found else "not measured"
