"""How long a decoding step takes on this machine, told by a few of the model's layers.

Layers of one kind cost the same whatever their weights, so two small models of the same sizes,
with made-up weights and ``a`` and ``b`` layers, tell the time of the whole one:

    t(L) = t(a) + (L - a) (t(b) - t(a)) / (b - a)
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from kvfold.arch.decoder import learned_positions
from kvfold.arch.layers import FULL, LATENT, SLIDING
from kvfold.bench.this_machine import last_level_cache
from kvfold.bench.timing import measure
from kvfold.errors import InputError, UnsupportedError
from kvfold.plan.model import Model
from kvfold.plan.roofline import Load, kv_cache_bytes
from kvfold.quality.device import check_memory

_FEW, _FEWER = 3, 1
_ROUNDS, _STEPS = 7, 2  # samples of each small model, and steps per sample
_TOKENS = _ROUNDS * _STEPS + 1  # decoded by each
_TYPES = {FULL: "full_attention", SLIDING: "sliding_attention"}


@dataclass(frozen=True)
class Counts:
    """How many layers the two small models have."""

    fewer: int
    few: int

    @classmethod
    def of(cls, layers: int, layer_bytes: float) -> "Counts":
        """As few as do not fit the last-level cache, where a whole model would not be either.

        >>> Counts.of(80, 1e12)
        Counts(fewer=1, few=3)
        """
        cold = ceil(2 * (last_level_cache() or 0) / layer_bytes)
        few = max(2, min(layers, max(_FEW, cold)))
        return cls(_FEWER if few <= _FEW else few // 2, few)

    def extrapolate(self, fewer: float, few: float, layers: int) -> float:
        """Seconds of so many layers."""
        return fewer + (layers - self.fewer) * (few - fewer) / (self.few - self.fewer)


class Prober:
    """Times decoding steps of a model that need not be here.

    Args:
        config: the model's ``config.json``. model: the same, read.

    Raises:
        UnsupportedError: for architectures transformers does not have, or without KV heads.
    """

    def __init__(self, config: Mapping[str, Any], model: Model) -> None:
        if any(layer.kind == LATENT for layer in model.layers):
            raise UnsupportedError("kvfold has no kernels for latent attention (MLA)")
        if not all(layer.has_kv_heads for layer in model.layers):
            raise UnsupportedError("layers that keep no keys and values cannot be timed")
        self._config, self._model = _known(config), model
        on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")

    def step(self, kv_heads: int, load: Load) -> float:
        """Seconds of one decoding step of the whole model, with kvfold's attention.

        Weights are float32 where the model's are stored so, else bfloat16.

        Raises:
            InputError: if a few layers and their caches do not fit this machine's memory, or the
                context not the positions that a model has learned.
            UnsupportedError: if the architecture cannot have that many KV heads.
        """
        positions = learned_positions(self._config.to_dict())
        if positions is not None and load.context + _TOKENS > positions:
            raise InputError(
                f"{self._model.name} has {positions} positions, too few to time a step after "
                f"{load.context} tokens",
                f"--context {positions - _TOKENS} is the most",
            )
        model = self._model.with_kv_heads(kv_heads)
        seconds = 0.0
        for kind, layers in model.kinds.items():
            own = kv_cache_bytes(model, load) / len(model.layers)
            counts = Counts.of(len(model.layers), model.weight_bytes / len(model.layers) + own)
            fewer, few = self._times(kind, kv_heads, load, counts)
            if not seconds:  # what is not a layer, once
                seconds = counts.extrapolate(fewer, few, 0)
            seconds += layers * (few - fewer) / (counts.few - counts.fewer)
        return seconds

    def _times(self, kind: str, kv_heads: int, load: Load, counts: Counts) -> tuple[float, float]:
        model = self._model
        needed = counts.few * 2 * (model.weight_bytes + kv_cache_bytes(model, load))
        check_memory(ceil(needed / len(model.layers)), "a smaller --batch or --context needs less")
        with torch.no_grad():
            steps = {
                str(count): self._decoder(kind, kv_heads, load, count)
                for count in (counts.fewer, counts.few)
            }
            timings = measure(steps, rounds=_ROUNDS, repeats=_STEPS)
        fewer, few = (min(timing.samples) for timing in timings.values())
        return fewer, few

    def _decoder(self, kind: str, kv_heads: int, load: Load, count: int) -> Any:
        """A function that decodes one token after the load's context."""
        import kvfold.transformers as drop_in

        config = self._sized(kind, kv_heads, count)
        wide = self._model.weight_bytes > 3 * self._model.parameters
        model = _made_up(config, torch.float32 if wide else torch.bfloat16, self._device)
        cache: Any = drop_in.KVCache(config, dtype=load.kv_dtype)
        for layer in cache.layers:
            layer.update(self._noise(kv_heads, load), self._noise(kv_heads, load))
        tokens = torch.zeros(load.batch, 1, dtype=torch.long, device=self._device)

        @torch.no_grad()
        def step() -> None:
            model(tokens, past_key_values=cache, use_cache=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize()

        return step

    def _noise(self, kv_heads: int, load: Load) -> torch.Tensor:
        head_dim = self._model.layers[0].head_dim
        shape = load.batch, kv_heads, load.context, head_dim
        return torch.randn(shape, dtype=torch.float32, device=self._device).bfloat16()

    def _sized(self, kind: str, kv_heads: int, count: int) -> Any:
        config = deepcopy(self._config)
        if kv_heads != self._model.num_kv_heads and not hasattr(config, "num_key_value_heads"):
            raise UnsupportedError(
                f"transformers' {config.model_type} cannot have fewer KV heads",
                f"--kv-heads {self._model.num_kv_heads}",
            )
        config.num_hidden_layers = count
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = kv_heads
        if getattr(config, "layer_types", None):
            config.layer_types = [_TYPES[kind]] * count
        return config


def _known(config: Mapping[str, Any]) -> Any:
    """transformers' own class for the text part of a config."""
    from transformers import AutoConfig

    text = dict(config.get("text_config") or config)
    kind = text.pop("model_type", config.get("model_type"))
    try:
        return AutoConfig.for_model(kind, **text)
    except ValueError as error:
        raise UnsupportedError(f"transformers knows no model type {kind!r}") from error


def _made_up(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model whose weights are all the same small number."""
    from transformers import AutoModelForCausalLM

    from kvfold.transformers import NAME

    with _without_initializing():
        try:
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=NAME, trust_remote_code=False
            )
        except KeyError as error:
            if error.args != (NAME,):
                raise
            raise UnsupportedError(  # a table of implementations of its own
                f"transformers' {config.model_type} takes no attention implementation from outside"
            ) from error
    for parameter in model.parameters():
        parameter.fill_(0.01)
    return model.eval().to(device)


def _without_initializing() -> AbstractContextManager[None]:
    """Random numbers for weights that are overwritten anyway would take longer than the timing."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return nullcontext()
    found: AbstractContextManager[None] = no_init_weights()
    return found
