"""A model whose decoder layers exist one at a time.

The model is built without weights; its own forward pass is run once with every layer replaced
by a recorder, which yields the input of the first layer and, for each layer, the arguments
(masks, rotary tables …) it is called with. Then single layers are given weights, run over
stored hidden states, and emptied again. So any architecture whose transformers implementation
calls its layers in order can be streamed, with no code of its own here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.arch.family import Family
from kvfold.checkpoint.stacked import stacked
from kvfold.errors import CheckpointError
from kvfold.fold.hidden import HiddenStates
from kvfold.kernels.torch.trained import can_train, trained


@dataclass
class AttentionCall:
    """What one attention module computed with: all after norms and rotary embedding.

    Attributes:
        query: ``[B, Hq, T, D]``; key: ``[B, Hkv, T, D]``; value: ``[B, Hkv, T, Dv]``.
        mask: boolean or additive ``[B or 1, 1, T, T]``, or None for plain causal.
        sinks: ``[Hq]``, a logit per head that takes attention away, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None = None

    def probabilities(self) -> torch.Tensor:
        """The attention weights ``[B, Hq, T, T]``."""
        batch, heads, tokens, _ = self.query.shape
        groups = (self.query * self.scale).unflatten(1, (self.key.shape[1], -1))
        scores = (groups @ self.key[:, :, None].mT).reshape(batch, heads, tokens, -1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        mask = _or_causal(self.mask, scores)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
        if self.sinks is not None:
            sinks = self.sinks[None, :, None, None].expand(batch, heads, tokens, 1)
            return torch.cat([scores, sinks.to(scores.dtype)], -1).softmax(-1)[..., :-1]
        result: torch.Tensor = scores.softmax(-1)
        return result

    def windows(self, which: slice) -> "AttentionCall":
        """Of some of the B windows."""
        mask = self.mask
        return replace(
            self,
            query=self.query[which],
            key=self.key[which],
            value=self.value[which],
            mask=mask if mask is None or len(mask) == 1 else mask[which],
        )

    def with_sinks(self) -> "AttentionCall":
        """The same with a key of its own for what sinks take away, whose value is zero.

        It is the first; queries and keys have one dimension more, in which only it is not zero:
        no scores need be stored for the sake of one number per head.
        """
        assert self.sinks is not None
        batch, heads, tokens, _ = self.query.shape
        logit = (self.sinks / self.scale).to(self.query.dtype)[None, :, None, None]
        query = torch.cat([self.query, logit.expand(batch, heads, tokens, 1)], -1)
        key = torch.nn.functional.pad(self.key, (0, 1, 1, 0))
        key[:, :, 0, -1] = 1
        value = torch.nn.functional.pad(self.value, (0, 0, 1, 0))
        mask = _or_causal(self.mask, self.query)
        seen = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([seen((*mask.shape[:-1], 1)), mask], -1)
        return replace(self, query=query, key=key, value=value, mask=mask, sinks=None)


def _or_causal(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The mask, or that of plain causal attention, ``[1, 1, T, T]``."""
    if mask is not None:
        return mask
    tokens = like.shape[2]
    return torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=like.device).tril()


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention implementation for transformers that can be listened to."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(query, key, value, attention_mask, scale, softcap, s_aux)
    listener = getattr(module, "kvfold_listener", None)
    if listener is not None:
        heard = replace(call, query=query.float(), key=key.float(), value=value.float())
        with torch.autocast(query.device.type, enabled=False):
            listener(heard)
    if softcap is None:
        if s_aux is not None:
            call = call.with_sinks()
        if call.mask is None or call.mask.dtype == torch.bool:
            q, k, v = _multiplied_in(call.query, call.key, call.value)
            if can_train(q, k, v):
                out = trained(q, k, v, scale, call.mask)
                return out.transpose(1, 2).contiguous(), None
        out, _ = sdpa_attention_forward(
            module, call.query, call.key, _widened(call.value, call.key), call.mask,
            scaling=scale, **kwargs,
        )  # fmt: skip
        return out[..., : value.shape[-1]], None
    weights = call.probabilities().unflatten(1, (key.shape[1], -1))
    out = (weights @ value[:, :, None]).flatten(1, 2)
    return out.transpose(1, 2).contiguous(), None


def _multiplied_in(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In autocast's dtype, which rotary embedding leaves queries and keys out of."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def _widened(value: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Values as wide as keys, which PyTorch's flash kernel for CPUs wants.

    Without it the scores of all heads are stored, T x T numbers each. Not where gradients are
    computed: of windows of 512 tokens that took longer than without.
    """
    narrower = key.shape[-1] - value.shape[-1]
    if narrower <= 0 or value.device.type != "cpu" or torch.is_grad_enabled():
        return value
    return torch.nn.functional.pad(value, (0, narrower))


IMPLEMENTATION = "kvfold_stream"
AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Recorder(nn.Module):
    """Stands in for a layer: keeps what it is called with, returns its input.

    Args:
        tuples: return it as the first of a tuple.
    """

    def __init__(self, layer: nn.Module, tuples: bool) -> None:
        super().__init__()
        self._tuples = tuples
        # Models read attributes of their layers (the kind of attention, for instance).
        object.__setattr__(self, "layer", layer)
        self.arguments: Arguments = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.arguments = (args, kwargs)
        return self.returned(hidden)

    def returned(self, hidden: torch.Tensor) -> Any:
        """As the layer returns it."""
        return (hidden,) if self._tuples else hidden


class _Giver(_Recorder):
    """Stands in for all layers: returns what the last of them has put out."""

    output: torch.Tensor

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.returned(self.output)


class LayerStream:
    """Runs a checkpoint's decoder layers one at a time, with weights and hidden states in float32.

    Args:
        config: the model's ``config.json``. family: its own.
        device: what layers run on. dtype: what they multiply in.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        family: Family,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        arguments = {key: value for key, value in config.items() if key != "dtype"}
        hf_config = AutoConfig.for_model(**arguments)
        family.offer(IMPLEMENTATION)
        with init_empty_weights(include_buffers=False), device:  # tables of the model lie there
            self.model = AutoModelForCausalLM.from_config(
                hf_config,
                dtype=torch.float32,
                attn_implementation=IMPLEMENTATION,
                trust_remote_code=False,
            )
        self.model.eval().requires_grad_(False)
        self._base_name, _, rest = family.layer.partition(".")
        self._list_name = rest.partition(".")[0]
        self._base = getattr(self.model, self._base_name)
        self._layers: nn.ModuleList = getattr(self._base, self._list_name)
        self._attention, self._renamed = family.attention, family.renamed
        self._tuples = family.tuples
        self._device, self._dtype = device, dtype
        self._arguments: dict[int, list[Arguments]] = {}  # by tokens of a window

    def start(
        self,
        texts: Sequence[torch.Tensor],
        load: Callable[[str], torch.Tensor],
        out: HiddenStates,
    ) -> None:
        """Write the first layer's input to ``out`` for each text's token ids ``[N, T]``."""
        recorders = nn.ModuleList(_Recorder(layer, self._tuples) for layer in self._layers)
        setattr(self._base, self._list_name, recorders)
        names = [name for name, _ in self._base.named_parameters()]
        state = {
            name: load(f"{self._base_name}.{name}").to(self._device, torch.float32)
            for name in names
        }
        self._base.load_state_dict(state, strict=False, assign=True)
        with torch.no_grad():
            for batch in out.batches():
                ids = texts[batch.text][batch.which].to(self._device)
                out[batch] = _first_input(self._base, ids)
            for text in texts:  # a batch of one, which broadcasts
                if not len(text) or text.shape[1] in self._arguments:
                    continue
                _first_input(self._base, text[:1].to(self._device))
                arguments: list[Any] = [recorder.arguments for recorder in recorders]
                self._arguments[text.shape[1]] = arguments
        _forget(self._base)
        setattr(self._base, self._list_name, self._layers)

    @contextmanager
    def ending(
        self, load: Callable[[str], torch.Tensor]
    ) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """What the model makes of its last layer's output ``[B, T, C]``: logits ``[B, T, V]``."""
        given = _Giver(self._layers[0], self._tuples)
        setattr(self._base, self._list_name, nn.ModuleList([given]))
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        tied = self.model.config.tie_word_embeddings
        unused = head.weight if tied else table.weight  # what tokens become is not needed
        state = {
            name: load(name).to(self._device, torch.float32)
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if parameter is not unused or (tied and name.startswith(self._base_name))
        }
        self.model.load_state_dict(state, strict=False, assign=True)
        if tied:
            head.weight = table.weight

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            given.output = hidden
            nothing = torch.zeros_like(hidden)
            found: torch.Tensor = self.model(inputs_embeds=nothing, use_cache=False).logits
            return found

        try:
            yield logits
        finally:
            _forget(self.model)
            setattr(self._base, self._list_name, self._layers)

    @contextmanager
    def layer(
        self, index: int, tensors: Mapping[str, torch.Tensor], *, copied: bool = False
    ) -> Iterator["LiveLayer"]:
        """Give one layer its weights for as long as the block runs.

        Args:
            tensors: by their names below the layer, as checkpoints have them.
            copied: the weights may be changed in place.
        """
        module = self._layers[index]
        weights = {
            name: tensor.to(self._device, torch.float32, copy=copied)
            for name, tensor in stacked(tensors, self._renamed).items()
        }
        module.load_state_dict(weights, strict=False, assign=True)
        missing = [name for name, p in module.named_parameters() if p.is_meta]
        if missing:
            raise CheckpointError(
                f"layer {index} has no {missing[0]}", "the checkpoint is incomplete; copy it again"
            )
        arguments = {tokens: layers[index] for tokens, layers in self._arguments.items()}
        try:
            yield LiveLayer(module, module.get_submodule(self._attention), arguments, self._dtype)
        finally:
            module.to("meta")


def _forget(module: nn.Module) -> None:
    """Give back the memory of its weights; tables that it made itself stay."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _first_input(base: Any, ids: torch.Tensor) -> torch.Tensor:
    """The first layer's input: recorders return theirs, so the first one has seen it."""
    seen: list[torch.Tensor] = []
    first = next(m for m in base.modules() if isinstance(m, _Recorder))
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        base(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


class _ReachedError(Exception):
    """What was asked for has been seen; the rest of the layer need not run."""


@dataclass
class LiveLayer:
    """A decoder layer that has its weights.

    Attributes:
        module: the layer. attention: its attention module.
        arguments: what the model calls it with besides the hidden states (batch size 1, which
            broadcasts), by tokens of a window.
        dtype: what it multiplies in.
    """

    module: nn.Module
    attention: nn.Module
    arguments: Mapping[int, Arguments]
    dtype: torch.dtype

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` -> ``[B, T, C]``, float32."""
        args, kwargs = self.arguments[hidden.shape[1]]
        lower = self.dtype != torch.float32
        with torch.autocast(hidden.device.type, self.dtype if lower else None, enabled=lower):
            out = self.module(hidden, *args, **kwargs)
        return out if isinstance(out, torch.Tensor) else out[0]

    def input_of(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer up to a module below it and no further; the module's input."""
        return self._reach(module.register_forward_pre_hook, lambda args: args[0], hidden)

    def attention_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the attention puts out, float32; nothing behind it is run."""
        found = self._reach(self.attention.register_forward_hook, lambda args, out: out[0], hidden)
        return found.float()

    def _reach(
        self,
        register: Callable[[Callable[..., None]], RemovableHandle],
        take: Callable[..., torch.Tensor],
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def hook(module: nn.Module, *passing: Any) -> None:
            seen.append(take(*passing))
            raise _ReachedError

        handle = register(hook)
        try:
            with suppress(_ReachedError):
                self(hidden)
        finally:
            handle.remove()
        return seen.pop()

    @contextmanager
    def listening(
        self,
        *,
        call: Callable[[AttentionCall], None] | None = None,
        attention_input: Callable[[torch.Tensor], None] | None = None,
        attention_output: Callable[[torch.Tensor], None] | None = None,
    ) -> Iterator[None]:
        """Hear what passes through the attention module while the block runs."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if attention_input is not None:
                attention_input(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if attention_output is not None:
                attention_output(output[0])

        handles = [
            self.attention.register_forward_pre_hook(before, with_kwargs=True),
            self.attention.register_forward_hook(after),
        ]
        self.attention.kvfold_listener = call  # type: ignore[assignment]
        try:
            yield
        finally:
            self.attention.kvfold_listener = None  # type: ignore[assignment]
            for handle in handles:
                handle.remove()
