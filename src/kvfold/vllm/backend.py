"""The attention backend as vLLM's registry has it: ``--attention-backend KVFOLD``."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVQuantMode

from kvfold.kernels.limits import BLOCK
from kvfold.kernels.registry import home
from kvfold.ops.format import Format
from kvfold.ops.formats import format_of
from kvfold.ops.options import Options
from kvfold.vllm.batch import Group, groups
from kvfold.vllm.layer import Layer, layer_options
from kvfold.vllm.pages import FORMATS, PageFormat, format_named
from kvfold.vllm.recent import Rings

NAME = "KVFOLD"


class KvfoldBackend(AttentionBackend):  # type: ignore[misc]
    """What vLLM asks before it makes layers, blocks and steps."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(FORMATS)

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["KvfoldImpl"]:
        return KvfoldImpl

    @staticmethod
    def get_builder_cls() -> type["KvfoldBuilder"]:
        return KvfoldBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 0 < head_size <= _kernels().max_dim

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # a head's tokens behind one another

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The bytes of a token as kvfold stores it, so that vLLM counts blocks rightly."""
        fmt = _format_of_spec(spec)
        packed = _kernels().packs(BLOCK)
        page = PageFormat(fmt, spec.head_size, spec.head_size_v, BLOCK, packed)
        dtype = spec.dtype if fmt.plain else torch.uint8
        return replace(spec, dtype=dtype, state_content_bytes=page.token_bytes)


def _kernels() -> Any:
    return home(torch.device(current_platform.device_type))


def _format_of_spec(spec: AttentionSpec) -> Format:
    mode = spec.kv_quant_mode
    if mode == KVQuantMode.NONE:
        return format_of(spec.dtype)
    if mode == KVQuantMode.FP8_PER_TENSOR:
        return format_of("fp8")
    return format_named(mode.name.lower(), spec.dtype)


@dataclass
class KvfoldMetadata(AttentionMetadata):  # type: ignore[misc]
    """One step, for every layer of a group.

    Attributes:
        num_actual_tokens: without padding. slot_mapping: vLLM's own, for its connectors.
    """

    groups: list[Group]
    num_actual_tokens: int
    slot_mapping: torch.Tensor


class KvfoldBuilder(AttentionMetadataBuilder[KvfoldMetadata]):  # type: ignore[misc]
    """Makes ``KvfoldMetadata`` of a step, once for all layers."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        coarse = _format_of_spec(kv_cache_spec).keeps_exact_ends
        # A connector may fill blocks behind our back, and a GPU's tables would have to come here.
        moved = vllm_config.kv_transfer_config is not None
        self._rings = Rings() if coarse and device.type == "cpu" and not moved else None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KvfoldMetadata:
        given, count = common_attn_metadata, common_attn_metadata.num_reqs
        if given.causal is not True:
            raise NotImplementedError("KVFOLD: attention that is not causal")
        begins = given.query_start_loc_cpu[: count + 1].tolist()
        lengths, on_device = given.seq_lens[:count], None
        if not lengths.is_cpu:
            lengths, on_device = given.seq_lens_cpu_upper_bound[:count], lengths
        table = given.block_table_tensor[:count]
        size = self.kv_cache_spec.block_size
        found = groups(begins, lengths.tolist(), table, on_device, self._rings, size)
        return KvfoldMetadata(found, given.num_actual_tokens, given.slot_mapping)


class KvfoldImpl(AttentionImpl[KvfoldMetadata]):  # type: ignore[misc]
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"KVFOLD: attention of type {attn_type}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.sliding_window = kv_cache_dtype, sliding_window
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self._softcap, self._slopes = logits_soft_cap, alibi_slopes
        self._layer: Layer | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KvfoldMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's keys and values, and attend.

        Args:
            query: ``[tokens, Hq, D]``; key ``[tokens, Hkv, D]``; value ``[tokens, Hkv, Dv]``.
            kv_cache: ``[blocks, Hkv, page_size, C]``, the layer's own.
            attn_metadata: None in runs that only measure memory.
            output: ``[tokens, Hq, Dv]``, written to.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("KVFOLD: output that is quantized on its way")
        if attn_metadata is None:
            return output
        if self._layer is None:
            self._prepare(layer, query)
        assert self._layer is not None
        steps, options = attn_metadata.groups, self._options
        if self.kv_sharing_target_layer_name is None:
            self._layer.forward(query, key, value, kv_cache, steps, options, output)
        else:
            self._layer.attend(query, kv_cache, steps, options, output)
        return output

    def _prepare(self, layer: Any, query: torch.Tensor) -> None:
        """Once weights are there, sinks among them."""
        slopes = None
        if self._slopes is not None:
            slopes = torch.tensor(self._slopes, dtype=torch.float32, device=query.device)
        sinks = None if self.sinks is None else self.sinks.detach().float()
        self._options: Options = layer_options(
            self.scale, self.sliding_window, self._softcap, slopes, sinks
        )
        fmt = format_named(self.kv_cache_dtype, query.dtype)
        self._layer = Layer(fmt, self.num_kv_heads, self.head_size, layer.head_size_v)
