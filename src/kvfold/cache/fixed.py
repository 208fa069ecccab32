"""A cache of fixed capacity whose lengths are a tensor: for CUDA graphs and compiled ones."""

from typing import Any, Unpack

import torch

from kvfold.cache.checks import (
    check_device,
    check_dtype,
    check_formats,
    check_heads,
    check_rotary,
    check_rows,
    check_sequences,
    check_sizes,
    check_switches,
    refuse_gradients,
)
from kvfold.cache.half import normal_tensors
from kvfold.cache.store import Shape, Store
from kvfold.errors import InputError
from kvfold.kernels.backend import Call
from kvfold.kernels.limits import BLOCK, MAX_TOKENS
from kvfold.kernels.pages import decoded
from kvfold.kernels.registry import attend, home
from kvfold.kernels.view import Angles, KVView
from kvfold.ops.options import Accepted, FixedOptions, check_options, declared
from kvfold.ops.rope import Rotary
from kvfold.ops.signatures import with_options

Dtype = str | torch.dtype
_OPTIONS = Accepted("attend", declared(FixedOptions))


class FixedKVCache:
    """Keys and values in memory that never moves; appending and attending never ask the host.

    Every step launches the same kernels on the same addresses, whatever the lengths, so it can be
    captured in a CUDA graph and replayed, or compiled by ``torch.compile`` as one graph, on a GPU
    or a CPU. ``KVCache`` grows, pages, shares and keeps INT4's ends exact; this one does not.

    Args:
        max_length: tokens of each sequence. Further ones are dropped on a GPU (ask ``overfull``),
            and refused on a CPU.
        window, sinks: attention sees the last ``window`` tokens and the first ``sinks`` only;
            the others keep their place.
        splits: of the keys of a step, to override the rule (``kernels.triton.splits``).

    Attributes:
        lengths: int32 ``[B]`` on the device, updated in place.

    Raises:
        InputError: for what cannot be, or where there are no kernels (C++ or Triton).

    >>> cache = FixedKVCache(8, 128, batch=4, max_length=4096, device="cuda")  # doctest: +SKIP
    >>> cache.append(k, v, rotary=Rotary(128))  # doctest: +SKIP
    >>> cache.attend(q).shape  # doctest: +SKIP
    torch.Size([4, 32, 1, 128])
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_length: int,
        v_head_dim: int | None = None,
        batch: int = 1,
        dtype: Dtype | tuple[Dtype, Dtype] = "bf16",
        window: int | None = None,
        sinks: int = 0,
        splits: int | None = None,
        device: str | torch.device = "cuda",
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        check_sizes(
            num_kv_heads=num_kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, batch=batch,
            max_length=max_length, window=window, sinks=sinks, splits=splits,
        )  # fmt: skip
        if max_length is None:
            raise InputError("max_length=None: a fixed cache needs its tokens of each sequence")
        self.num_kv_heads, self.head_dim, self.v_head_dim = num_kv_heads, head_dim, v_head_dim
        self.batch, self.max_length, self.device = batch, max_length, check_device(device)
        self.window, self.sinks, self.splits = window, sinks, splits
        formats = check_formats(dtype)
        kernels = home(self.device)
        if not kernels.replays:
            raise InputError(
                f"a fixed cache on {self.device} has no kernels",
                "it needs the compiled ones, or Triton and a GPU; kvfold.KVCache works everywhere",
            )
        if max(head_dim, v_head_dim) > kernels.max_dim:
            raise InputError(
                f"heads of {max(head_dim, v_head_dim)}: expected at most {kernels.max_dim}"
            )
        page = -(-max_length // BLOCK) * BLOCK
        page = page if kernels.packs(page) else max_length
        self._store = Store(
            Shape(batch, num_kv_heads, head_dim, v_head_dim, *formats, page, batch, self.device)
        )
        with normal_tensors():
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self._offered = torch.zeros_like(self.lengths)
            self._table = torch.arange(batch, dtype=torch.int32, device=self.device)[:, None]
        self._rotary: Rotary | None = None
        self._see()

    def _see(self) -> None:
        """Look at the store as the kernels do, which read lengths where they are."""
        rows = self._store.keys.rows(), self._store.values.rows()
        size = self._store.page_size
        self._view = KVView(*rows, self._table, size, None, self.lengths, self.max_length)

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name != "_view"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._see()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values take."""
        return self._store.nbytes

    def append(self, k: torch.Tensor, v: torch.Tensor, *, rotary: Rotary | None = None) -> None:
        """Add tokens at the end of every sequence, in one kernel for keys and one for values.

        Args:
            k: ``[B, Hkv, T, D]``; v: ``[B, Hkv, T, Dv]``; float32, float16 or bfloat16.
            rotary: applied to the keys first, at their positions, in the same pass.

        Raises:
            InputError: for shapes or dtypes that do not fit, beyond ``max_length`` on a CPU, and
                where gradients are needed.
        """
        check_rows("k", k, self.batch, self.num_kv_heads, self.head_dim, self.device)
        check_rows("v", v, self.batch, self.num_kv_heads, self.v_head_dim, self.device)
        if k.shape[2] != v.shape[2]:
            raise InputError(f"k has {k.shape[2]} tokens but v has {v.shape[2]}")
        refuse_gradients(k, v)
        tokens = k.shape[2]
        angles = None
        if rotary is not None:
            check_rotary(rotary, self.head_dim)
            cosines, sines = self._turns(rotary)
            positions = self.lengths[:, None] + torch.arange(
                tokens, dtype=torch.int32, device=self.device
            )
            at = positions.clamp(max=self.max_length - 1)
            if self._store.kernels.turns:
                angles = Angles(cosines[at], sines[at], rotary.interleaved)
            else:
                k = rotary.apply(k, cosines[at], sines[at])
        self._store.kernels.append(k.detach(), v.detach(), self._view, angles)
        self._offered += tokens
        self.lengths.copy_(self._offered.clamp(max=self.max_length))

    def _turns(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all positions, made once: a graph cannot make them."""
        if self._rotary != rotary:
            everywhere = torch.arange(self.max_length, dtype=torch.int32, device=self.device)
            self._rotary, self._cos_sin = rotary, rotary.cos_sin(everywhere)
        return self._cos_sin

    @with_options
    def attend(
        self, q: torch.Tensor, *, return_lse: bool = False, **options: Unpack[FixedOptions]
    ) -> Any:
        """Attention of the last T tokens over everything in the cache, themselves included.

        Args:
            q: ``[B, Hq, T, D]``, T at most 16 on a GPU.
            options: of attention; see the signature.
            return_lse: see ``kvfold.attention``.

        S is ``max_length``; tensors are on the device.

        Returns:
            ``[B, Hq, T, Dv]`` in q's dtype, and with ``return_lse`` also ``[B, Hq, T]`` float32.

        Raises:
            InputError: for shapes that do not fit, and where gradients are needed.
        """
        check_rows("q", q, self.batch, None, self.head_dim, self.device)
        check_heads(q, self.num_kv_heads)
        check_switches(return_lse=return_lse)
        if q.shape[2] > MAX_TOKENS and not self._store.kernels.prompts:
            raise InputError(f"q has {q.shape[2]} tokens: expected at most {MAX_TOKENS}")
        shape = self.batch, q.shape[1], q.shape[2], self.max_length
        _OPTIONS.refuse_others(options)
        own = {"window": self.window, "sinks": self.sinks}
        checked = check_options(shape, {**options, **own})
        refuse_gradients(q, *checked.tensors().values())
        call = Call(
            q.detach(), None, [self._view], self.lengths, checked, self.num_kv_heads,
            self.v_head_dim, self.max_length, False, self._store.kernels.name, return_lse,
            splits=self.splits,
        )  # fmt: skip
        out, lse = attend(call)
        return (out, lse) if return_lse else out

    def read(self, sequence: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What a sequence holds, decoded: float32 ``[Hkv, S, D]``, ``[Hkv, S, Dv]``. Waits."""
        (sequence,) = check_sequences([sequence], self.batch)
        self._store.table = self._table.cpu()
        return self._store.read(sequence, 0, int(self.lengths[sequence]))

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything, decoded: ``[B, Hkv, max_length, D]``, zeros where nothing is. Waits."""
        check_dtype(dtype)
        return decoded([self._view], self.max_length, dtype)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        check_sizes(length=length)
        self.lengths.clamp_(max=length)
        self._offered.clamp_(max=length)

    def reorder(self, sequences: list[int]) -> None:
        """Make sequence i what sequence ``sequences[i]`` was (beam search); copies all of them."""
        rows = check_sequences(sequences, self.batch)
        if len(rows) != self.batch:
            raise InputError(f"{len(rows)} sequences: a fixed cache keeps its {self.batch}")
        chosen = torch.tensor(rows, device=self.device)
        for held in (*self._store, self.lengths, self._offered):
            held.copy_(held[chosen])

    def overfull(self) -> bool:
        """Whether tokens were dropped; this waits for the GPU."""
        return bool((self._offered > self.max_length).any())

    def reset(self) -> None:
        """Forget everything."""
        self.lengths.zero_()
        self._offered.zero_()
