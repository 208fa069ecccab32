"""Attention layers as vLLM makes them, for tests of the plugin; it is imported only then."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from tests.toolbox import tiny
from tests.toolbox.attention_cases import default_dtype

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="pip install -e '.[vllm]'")
OWN, OURS = "CPU_ATTN", "KVFOLD"  # backends
#: What vLLM's own backend knows of.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@cache
def any_folder() -> str:
    """A checkpoint, for what a configuration says of a model besides its layers."""
    return str(tiny.save_with_tokenizer(tiny.make("llama"), Path(mkdtemp()) / "any"))


@cache
def _config(backend: str, dtype: torch.dtype, block_size: int, cache_dtype: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=any_folder(), dtype=str(dtype).removeprefix("torch."), attention_backend=backend,
        block_size=block_size, kv_cache_dtype=cache_dtype, kv_cache_memory_bytes=2**28,
        max_model_len=128,
    )  # fmt: skip
    return arguments.create_engine_config()


@contextmanager
def _current(config: Any) -> Iterator[None]:
    from vllm.config import set_current_vllm_config

    dtype = str(config.model_config.dtype).removeprefix("torch.")
    with set_current_vllm_config(config), default_dtype(dtype):
        yield


NAME = "model.layers.0.self_attn.attn"


@dataclass
class VllmLayer:
    """One attention layer as vLLM makes it, its memory and its steps.

    Attributes:
        options: of vLLM's ``Attention``.
    """

    backend: str
    heads: tuple[int, int]
    head_size: int
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 128
    cache_dtype: str = "auto"
    num_blocks: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from vllm.model_executor.layers.attention import Attention

        self.config = _config(self.backend, self.dtype, self.block_size, self.cache_dtype)
        known = self.config.compilation_config.static_forward_context
        known.clear()
        with _current(self.config):
            self.layer = Attention(
                self.heads[0], self.head_size, self.head_size**-0.5, self.heads[1],
                cache_config=self.config.cache_config, prefix=NAME, **self.options,
            )  # fmt: skip
            self._allocate()
            made = self.layer.attn_backend.get_builder_cls()
            self.builder = made(self.spec, [NAME], self.config, torch.device("cpu"))

    def _allocate(self) -> None:
        """Memory by vLLM's own functions, full of what was there before."""
        from vllm.v1.attention.backends.utils import record_kv_cache_layout
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
        from vllm.v1.worker.utils import allocate_kv_cache, customize_attention_spec

        config, backend = self.config, self.layer.attn_backend
        spec = customize_attention_spec(backend, self.layer.get_kv_cache_spec(config))
        config.cache_config.num_gpu_blocks_override = self.num_blocks
        [layout] = backend.supported_kv_cache_layouts()
        record_kv_cache_layout(config.cache_config, layout.name)
        [found] = get_kv_cache_configs(config, [{NAME: spec}], [2**30])
        self.spec = found.kv_cache_groups[0].kv_cache_spec
        memory = allocate_kv_cache(found, torch.device("cpu"), layout, [self.spec.block_size])
        self.memory = memory[NAME]
        if self.backend == OURS:  # vLLM's own multiplies what it does not see by zero
            self.memory.view(torch.uint8).random_(generator=torch.Generator().manual_seed(0))

    def step(
        self,
        new: Sequence[int],
        lengths: Sequence[int],
        table: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """What ``forward`` gives for a batch of sequences.

        Args:
            new: tokens of each. lengths: of the sequences, those included.
            table: int32 ``[B, blocks]``. qkv: ``[tokens, heads, D]`` each.
        """
        given, (q, k, v) = self._metadata(new, lengths, table), qkv
        metadata = self.builder.build(0, given)
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        layer, impl = self.layer, self.layer.impl
        if not layer.attn_backend.forward_includes_kv_cache_update:
            impl.do_kv_cache_update(layer, k, v, self.memory, given.slot_mapping)
        impl.forward(layer, q, k, v, self.memory, metadata, out)
        return out

    def _metadata(self, new: Sequence[int], lengths: Sequence[int], table: torch.Tensor) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        begins = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
        ends = torch.tensor(lengths, dtype=torch.int32)
        positions = [torch.arange(end - n, end) for n, end in zip(new, lengths, strict=True)]
        size = self.block_size
        slots = [
            row[at // size].long() * size + at % size
            for row, at in zip(table, positions, strict=True)
        ]
        return CommonAttentionMetadata(
            query_start_loc=begins, query_start_loc_cpu=begins, seq_lens=ends,
            seq_lens_cpu_upper_bound=ends, num_reqs=len(new), num_actual_tokens=sum(new),
            max_query_len=max(new), max_seq_len=max(lengths), block_table_tensor=table,
            slot_mapping=torch.cat(slots), positions=torch.cat(positions),
        )  # fmt: skip
