"""Bytes and time at best: what memory a model takes, and what binds its speed.

A step cannot be faster than reading what it needs from memory, nor than its multiplications; the
larger of the two binds it (roofline; Williams et al., 2009). Real steps are slower.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvfold.arch.layers import FULL, LATENT, Layer
from kvfold.ops.formats import FORMATS
from kvfold.ops.select import MOST_SHARE, PAGES
from kvfold.plan.hardware import Hardware
from kvfold.plan.model import Model

# Bits per number of a cache format, scales included, for heads of 128 (see docs/attention.md).
KV_BITS = {name: fmt.bits_each(128) for name, fmt in FORMATS.items()}
PREFILL_CHUNK = 2048  # tokens of a prompt that go through the model together
_ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Load:
    """What is asked of a model.

    Attributes:
        context: tokens of each sequence. batch: sequences. kv_dtype: of the cache.
        gpus: that share each layer (tensor parallelism).
        select: the share of the cache that a step of decoding reads (``kvfold.Select``), in layers
            of full attention. evict: the share of the tokens that these keep (``kvfold.Evict``).
    """

    context: int
    batch: int
    kv_dtype: str = "bf16"
    gpus: int = 1
    select: float | None = None
    evict: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    weights: float
    kv_cache: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True)
class Bound:
    """The least time of something, in seconds, and what binds it: ``memory`` or ``arithmetic``.

    ``unknown`` arithmetic (no published FLOPs) never binds.
    """

    seconds: float
    binds: str


def summary_bits(kv_dtype: str) -> float:
    """Bits for each number of the cache that tell of pages: two rows of keys' size a page, in
    bfloat16, or in bytes where that would be more than a twentieth of the cache."""
    page = PAGES[-1]
    return next(bits / page for bits in (16, 8) if bits / page <= MOST_SHARE * KV_BITS[kv_dtype])


def _bits(layer: Layer, load: Load, *, read: bool = False) -> float:
    """Bits of a cached number that are kept, or read in a step of decoding."""
    bits = KV_BITS[load.kv_dtype]
    if load.select is None or layer.kind != FULL:
        return bits
    return (load.select if read else 1) * bits + summary_bits(load.kv_dtype)


def _layer_bytes(layer: Layer, load: Load, *, read: bool = False) -> float:
    """What a layer keeps of all sequences on one GPU, or reads; of a window no more than that."""
    tokens = layer.kept(load.context) * (load.evict or 1 if layer.kind == FULL else 1)
    return load.batch * layer.kv_numbers(load.gpus) * tokens * _bits(layer, load, read=read) / 8


def _cached_bytes(model: Model, load: Load, *, read: bool = False) -> float:
    return sum(_layer_bytes(layer, load, read=read) for layer in model.layers)


def _whole_layer(model: Model, load: Load) -> float:
    """Bytes beside the cache while a prompt goes through a layer, which evicts after it."""
    if load.evict is None:
        return 0.0
    whole = replace(load, evict=None)
    return max(_layer_bytes(layer, whole) - _layer_bytes(layer, load) for layer in model.layers)


def kv_bytes_per_token(model: Model, kv_dtype: str, gpus: int = 1) -> float:
    """Bytes a token of full attention adds to the cache, all layers, per GPU."""
    return sum(layer.kv_numbers(gpus) for layer in model.layers) * KV_BITS[kv_dtype] / 8


def kv_cache_bytes(model: Model, load: Load) -> float:
    """The KV cache of all sequences on one GPU; sliding layers keep their window only."""
    return _cached_bytes(model, load)


def memory(model: Model, load: Load) -> Memory:
    """What one GPU must hold.

    Activations are those of a prefill chunk: the residual stream, one layer's MLP and attention
    inputs, and the logits of each sequence's last token; where tokens are evicted, also what one
    layer holds before. Frameworks add their own to that.
    """
    tokens = min(PREFILL_CHUNK, load.batch * load.context)
    widest = 2 * model.intermediate_size + 3 * model.num_heads * model.layers[0].head_dim
    per_token = 2 * model.hidden_size + widest / load.gpus
    logits = load.batch * model.vocab_size * 4
    return Memory(
        model.weight_bytes / load.gpus,
        kv_cache_bytes(model, load),
        tokens * per_token * _ACTIVATION_BYTES + logits + _whole_layer(model, load),
    )


def decode_step(model: Model, load: Load, hardware: Hardware) -> Bound:
    """One token for every sequence: weights and cache are read once, or what is selected of it."""
    cache = _cached_bytes(model, load, read=True)
    weights = model.weight_bytes * _share_met(model, load.batch) / load.gpus
    flops = load.batch * (2 * model.active_parameters + _attention_flops(model, 1, load.context))
    return _bound(cache + weights, flops / load.gpus, hardware)


def prefill(model: Model, load: Load, hardware: Hardware) -> Bound:
    """All prompts of ``context`` tokens: causal attention does half of the pairs."""
    tokens = load.batch * load.context
    pairs = load.batch * _attention_flops(model, load.context, load.context) / 2
    flops = 2 * model.active_parameters * tokens + pairs
    chunks = -(-tokens // PREFILL_CHUNK)
    cache = kv_cache_bytes(model, replace(load, evict=None))
    read = chunks * model.weight_bytes / load.gpus + cache
    return _bound(read, flops / load.gpus, hardware)


def _share_met(model: Model, tokens: int) -> float:
    """The share of the weights that a batch reads: experts not chosen by anyone are not read."""
    active = model.active_parameters / model.parameters
    return min(1.0, 1 - (1 - active) ** tokens)


def _attention_flops(model: Model, tokens: int, context: int) -> float:
    """q kᵀ and weights times v, all layers, every pair counted; see ``geometry``."""
    total = 0.0
    for layer in model.layers:
        dims = layer.head_dim + layer.v_head_dim
        if layer.kind == LATENT:
            # Every head meets the latent as key and as value, and the rotary key besides. Prompts
            # may expand it to heads, by products that are among those of the weights.
            absorbed = 2 * layer.latent - layer.rotary
            dims = absorbed if tokens == 1 else min(dims, absorbed)
        total += 2.0 * layer.num_heads * tokens * layer.kept(context) * dims
    return total


def _bound(bytes_read: float, flops: float, hardware: Hardware) -> Bound:
    reading = bytes_read / hardware.bandwidth
    computing = flops / hardware.flops if hardware.flops else 0.0
    if computing > reading:
        return Bound(computing, "arithmetic")
    return Bound(reading, "memory")


def largest(fits: Callable[[int], bool], most: int = 1 << 30) -> int:
    """The largest n for which ``fits(n)`` holds, where it holds up to some n; 0 if none.

    >>> largest(lambda n: n * n <= 50)
    7
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
