"""The cache of multi-head latent attention: one latent and one rotary key per token."""

from typing import Unpack

import torch

from kvfold.cache.checks import (
    check_dtype,
    check_formats,
    check_latents,
    check_sequences,
    check_sizes,
)
from kvfold.cache.kv import KVCache
from kvfold.errors import InputError
from kvfold.kernels.limits import MAX_DIM
from kvfold.ops.format import Format
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import CacheOptions
from kvfold.ops.signatures import with_options

Dtype = str | torch.dtype


class LatentCache:
    """Latents of a batch of sequences, one layer's, and attention over them.

    Multi-head latent attention (MLA, arXiv 2405.04434) makes every head's key and value of one
    latent c and one rotary key k that all heads share. The cache holds ``[c | k]`` once per token.
    Queries in the coordinates of the latent read it as it is, for all heads at once: the row is
    the key, its first numbers are the value, and neither is ever expanded.

    Args:
        kv_lora_rank: numbers of a latent. qk_rope_head_dim: numbers of the rotary key.
        batch: number of sequences. They may have different lengths.
        dtype: ``fp32``, ``fp16``, ``bf16``, ``fp8`` or ``int8``.
        kind: ``contiguous`` or ``paged``; these, ``max_length``, ``page_size`` and ``device`` are
            as for ``kvfold.KVCache``.

    Raises:
        InputError: for what cannot be.

    >>> cache = LatentCache(kv_lora_rank=64, qk_rope_head_dim=16)
    >>> cache.append(torch.randn(1, 10, 64), torch.randn(1, 10, 16))
    >>> cache.attend(torch.randn(1, 8, 1, 64 + 16), scale=48**-0.5).shape
    torch.Size([1, 8, 1, 64])
    >>> cache.bytes_per_token  # of 80 numbers in bfloat16
    160.0
    """

    def __init__(
        self,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        *,
        batch: int = 1,
        dtype: Dtype = "bf16",
        kind: str = "contiguous",
        max_length: int | None = None,
        page_size: int = 64,
        device: str | torch.device = "cpu",
    ) -> None:
        check_sizes(kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim)
        width = kv_lora_rank + qk_rope_head_dim
        if width > MAX_DIM:
            sizes = f"kv_lora_rank={kv_lora_rank} + qk_rope_head_dim={qk_rope_head_dim} = {width}"
            raise InputError(f"{sizes}: the kernels read at most {MAX_DIM} numbers of a token")
        check_format(dtype)
        if isinstance(kind, str) and kind == "sliding":
            raise InputError("kind='sliding': latents are kept 'contiguous' or 'paged'")
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self._cache = _Within(
            1, width, v_head_dim=kv_lora_rank, batch=batch, dtype=dtype, kind=kind,
            max_length=max_length, page_size=page_size, device=device,
        )  # fmt: skip

    @property
    def batch(self) -> int:
        return self._cache.batch

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return self._cache.lengths

    @property
    def kind(self) -> str:
        return self._cache.kind

    @property
    def format(self) -> Format:
        return self._cache.formats[0]

    @property
    def device(self) -> torch.device:
        return self._cache.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory the cache has allocated, used or not."""
        return self._cache.nbytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes a token of one sequence takes, scales included."""
        return self._cache.bytes_per_token

    @property
    def bytes_per_step(self) -> float:
        """Bytes that one step of attention reads, all sequences."""
        return self._cache.bytes_per_step

    def append(
        self, c: torch.Tensor, k_rope: torch.Tensor, sequences: list[int] | None = None
    ) -> None:
        """Add tokens at the end of the sequences.

        Args:
            c: ``[B, T, kv_lora_rank]``, after its norm.
            k_rope: ``[B, T, qk_rope_head_dim]``, after rotary embedding.
            sequences: which ones, B indices; all of them by default.

        Raises:
            InputError: for shapes or dtypes that do not fit, beyond ``max_length``, and for
                tensors that need gradients, which the cache would lose.
        """
        batch = len(check_sequences(sequences, self.batch))
        check_latents(c, k_rope, batch, (self.kv_lora_rank, self.qk_rope_head_dim))
        rows = torch.cat([c, k_rope], -1)[:, None]
        self._cache.append(rows, rows[..., : self.kv_lora_rank], sequences)

    @with_options
    def attend(
        self,
        q: torch.Tensor,
        *,
        return_lse: bool = False,
        sequences: list[int] | None = None,
        **options: Unpack[CacheOptions],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the last T tokens over everything in the cache, themselves included.

        Args:
            q: ``[B, Hq, T, kv_lora_rank + qk_rope_head_dim]``: queries in the coordinates of the
                latent, ``W_k^T q`` of a head whose keys are ``W_k c``, then of the rotary key.
            options: of attention; see the signature. ``scale`` must be among them, mostly
                ``(qk_nope_head_dim + qk_rope_head_dim) ** -0.5``: a cache cannot tell.
            return_lse: see ``kvfold.attention``.
            sequences: which ones, B indices; all of them by default.

        Returns:
            ``[B, Hq, T, kv_lora_rank]`` in q's dtype: ``W_v`` times that is a head's output. With
            ``return_lse`` also ``[B, Hq, T]`` float32.

        Raises:
            InputError: for shapes that do not fit.
        """
        if options.get("scale") is None:
            raise InputError(
                "no scale: a latent's size does not tell the heads' it is made into",
                "give scale=(qk_nope_head_dim + qk_rope_head_dim) ** -0.5",
            )
        return self._cache.attend(q, return_lse=return_lse, sequences=sequences, **options)

    def read(self, sequence: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds of a sequence, decoded: float32 ``[S, rank]``, ``[S, rope]``."""
        rows, _ = self._cache.read(sequence)
        return self._split(rows[0])

    def tensors(
        self, dtype: torch.dtype, sequences: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything, decoded: ``[B, S, rank]`` and ``[B, S, rope]``, zeros behind shorter ones."""
        check_dtype(dtype)
        rows, _ = self._cache.tensors(dtype, sequences)
        return self._split(rows[:, 0])

    def _split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c, k_rope = rows.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        return c, k_rope

    def truncate(self, length: int, sequences: list[int] | None = None) -> None:
        """Forget all tokens from position ``length`` on, as speculative decoding must."""
        self._cache.truncate(length, sequences)

    def clear(self, sequences: list[int] | None = None) -> None:
        """Forget everything; the memory is kept for new tokens."""
        self._cache.clear(sequences)

    def fork(self, source: int, target: int) -> None:
        """Make ``target`` a copy of ``source`` that shares its pages until either changes.

        Raises:
            InputError: for a contiguous cache, which has no pages to share.
        """
        self._cache.fork(source, target)

    def reorder(self, sequences: list[int]) -> None:
        """Make sequence i what sequence ``sequences[i]`` was (beam search). Pages are shared."""
        self._cache.reorder(sequences)


class _Within(KVCache):
    """A cache of one KV head whose values are the first numbers of its keys."""

    _within = True


def check_format(dtype: object) -> None:
    """Refuse formats of which a part of a row cannot be read.

    Its numbers must be whole bytes, and have one scale at most.
    """
    fmt, _ = check_formats((dtype, dtype))
    if fmt.grouped or fmt.rotates_keys:
        known = ", ".join(x.name for x in FORMATS.values() if not (x.grouped or x.rotates_keys))
        raise InputError(
            f"dtype={fmt.name!r}: a latent is read as key and, in part, as value",
            f"choose one of {known}",
        )
