"""One call of the CPU kernels, and the tensors that must live as long as it runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from kvfold.errors import InputError
from kvfold.kernels.cpu.library import Append, Attend, Library, Part, Side, Tensor
from kvfold.kernels.cpu.pointer import Buffer, Int32s
from kvfold.kernels.layout import Layout
from kvfold.kernels.view import KVView, Positions, Rows, readable
from kvfold.ops.kinds import MASK
from kvfold.ops.options import FIELDS, Options

#: The options that the kernels know: those that their call has a field for.
KNOWN = frozenset(FIELDS).intersection(name for name, _ in Attend._fields_) | {"lengths"}

_QUERIES, _OUT, _LSE = Buffer("q"), Buffer("out"), Buffer("lse", torch.float32)
_BUFFERS = {n: Buffer(n, kind.dtype or torch.float32) for n, kind in FIELDS.items()}
_TAKEN = [(i, n, FIELDS[n]) for i, n in enumerate(FIELDS) if n in KNOWN - {"lengths"}]
_NUMBERS = [each for each in _TAKEN if not each[2].is_tensor]
_TENSORS = [each for each in _TAKEN if each[2].is_tensor]

_KEYS, _VALUES = Buffer("k"), Buffer("v")
#: Where ``append`` keeps its last call.
APPEND = "cpu append"
_ROWS = Buffer("rows")
_PAGES, _SCALES = Buffer("pages", torch.uint8), Buffer("scales", torch.bfloat16)

Kept = TypeVar("Kept", torch.Tensor, Int32s)


class KernelCall:
    """Attention of ``q`` ``[B, Hq, T, D]`` over stores of ``num_kv_heads`` heads.

    Args:
        lengths: of each sequence; its last query stands at position ``lengths[b] - 1``.
        options: their own ``lengths`` are not read.
        keys: the most positions of a sequence, for which the mask has entries.

    Raises:
        InputError: for tensors that the kernels cannot read as they are meant.
    """

    def __init__(
        self,
        q: torch.Tensor,
        num_kv_heads: int,
        lengths: Positions,
        options: Options,
        keys: int,
    ) -> None:
        self._call = call = Attend()
        self._shape = q.shape
        call.batch, call.num_heads, call.tokens, call.head_dim = q.shape
        call.num_kv_heads = num_kv_heads
        self.ask(q)
        self.lengths = Int32s(lengths)
        self._numbers = {id(lengths): self.lengths}
        self._kept: list[object] = [lengths]
        self._seen: list[KVView] = []
        if len(lengths) != call.batch:
            raise InputError(f"{len(lengths)} lengths for {call.batch} sequences of queries")
        call.length = self.lengths.address
        self._ask(options, keys)

    def ask(self, q: torch.Tensor) -> None:
        """The same of other queries of this shape."""
        self._q = readable(q)
        self._call.q = Tensor.of(self._q, self._shape, _QUERIES)

    @property
    def struct(self) -> Attend:
        """What C is told."""
        return self._call

    def kept(self, x: Kept) -> Kept:
        """Keep what C reads alive until the call has run."""
        self._kept.append(x)
        return x

    def _ask(self, options: Options, keys: int) -> None:
        """Set the field of every option."""
        call, flat = self._call, options.flat()
        call.scale = call.head_dim**-0.5
        for i, name, kind in _NUMBERS:
            x = flat[i]
            if x is not None or kind.none:
                setattr(call, name, kind.number(x))
        for i, name, kind in _TENSORS:
            x = flat[i]
            if x is None:
                continue
            if kind is MASK:
                self._bias(x, keys)
            else:
                each = self.kept(kind.stored(x))
                count = call.batch if kind.along == 0 else call.num_heads
                setattr(call, name, _BUFFERS[name].address(each, (count,)))

    def _bias(self, mask: torch.Tensor, keys: int) -> None:
        call = self._call
        shape = (call.batch, call.num_heads, call.tokens, keys)
        full = _additive(mask)
        if full.shape[-1] != keys:
            full = full.expand(*full.shape[:-1], keys).contiguous()
        view = self.kept(full).expand(shape)
        call.mask = _BUFFERS["mask"].row_address(view, shape)
        strides = view.stride()
        call.mask_batch_stride, call.mask_head_stride, call.mask_token_stride = strides[:3]

    def _positions(self, given: Positions) -> Int32s:
        """What views may share goes over once, and lives until the call has run."""
        found = self._numbers.get(id(given))
        if found is None:
            found = Int32s(given)
            self._numbers[id(given)] = found
            self._kept.append(given)  # nothing else can get its id
        return found

    def _read(self, views: Sequence[KVView]) -> None:
        """Set the parts; where only rows are others than in the last call, only these."""
        parts = self._call.parts
        self._call.num_parts = len(views)
        again = len(views) == len(self._seen)
        for index, view in enumerate(views):
            if again and _alike(view, self._seen[index]):
                parts[index].k, parts[index].v = sides_of(view)
                continue
            begin = None if view.begin is None else self._positions(view.begin)
            parts[index] = part_of(view, begin, self._positions(view.end))
        self._seen = list(views)

    def run(
        self,
        lib: Library,
        views: Sequence[KVView],
        v_head_dim: int,
        return_lse: bool,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output ``[B, Hq, T, Dv]`` in q's dtype, or ``out``; perhaps the log-sum-exp."""
        call, shape = self._call, self._q.shape[:3]
        if out is None:
            out = self._q.new_empty(*shape, v_head_dim)
        call.v_head_dim = v_head_dim
        call.out = Tensor.of(out, (*shape, v_head_dim), _OUT)
        lse = None
        if return_lse:
            lse = torch.empty(shape, dtype=torch.float32, device=out.device)
            call.lse = _LSE.address(lse, shape)
        self._read(views)
        lib.attend(call)
        return out, lse


def _alike(view: KVView, other: KVView) -> bool:
    """Whether two views are of the same positions, and differ in their rows at most."""
    return (
        view.table is other.table
        and view.page_size == other.page_size
        and view.begin is other.begin
        and view.end is other.end
    )


def _additive(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.detach().resolve_neg()
    if mask.dtype == torch.bool:
        nothing = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return nothing.masked_fill(~mask, -torch.inf)
    return mask.float().contiguous()


def append(
    lib: Library,
    k: torch.Tensor,
    v: torch.Tensor,
    view: KVView,
    kept: dict[str, Any] | None = None,
) -> None:
    """Write tokens ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]`` from the view's ends on."""
    size = k.shape[:3]
    keys = Tensor.of(k, (*size, view.keys.dim), _KEYS)
    values = Tensor.of(v, (*size, view.values.dim), _VALUES)
    last: Written | None = None if kept is None else kept.get(APPEND)
    if last is not None and last.size == size and _alike(view, last.view):
        call = last.call
        call.k, call.v = keys, values
        call.part.k, call.part.v = sides_of(view)
    else:
        starts = Int32s(view.end)
        if starts.count != size[0]:
            raise InputError(f"{starts.count} positions for {size[0]} sequences of keys")
        call = Append(*size, keys, values, starts.address)
        call.part = part_of(view, None, starts)
        if kept is not None:
            kept[APPEND] = Written(call, view, size, starts)
    lib.append(call)


class Written(NamedTuple):
    """The last call of ``append``, and what C reads of it."""

    call: Append
    view: KVView
    size: torch.Size
    starts: Int32s


def part_of(view: KVView, begin: Int32s | None, end: Int32s) -> Part:
    """The view as C has it; it, and the positions, must outlive the calls that read them.

    Raises:
        InputError: if its tensors are not what the kernels can follow.
    """
    return Part.of(*sides_of(view), view.table, view.page_size, begin, end)


def sides_of(view: KVView) -> tuple[Side, Side]:
    """Keys and values as C has them; found once for all views of the same rows."""
    k, v = view.keys, view.values
    if not isinstance(k.known, Side):
        k.known = side_of(k, view.page_size, True)
    if not isinstance(v.known, Side):
        v.known = side_of(v, view.page_size, False)
    return k.known, v.known


def side_of(rows: Rows, page_size: int, key: bool) -> Side:
    """Where the rows of a view lie. Strides are in bytes."""
    if rows.packed:
        return _packed_side(rows, page_size, key)
    fmt, data, scales = rows.fmt, rows.data, rows.scales
    size, shape = data.element_size(), data.shape
    if size * shape[3] != fmt.row_bytes(rows.dim) or shape[2] not in (page_size, 0):
        raise InputError(f"pages {list(shape)} of {page_size} tokens, {rows.dim} {fmt.name} each")
    page, head, row, _ = data.stride()
    side = Side(
        fmt.code, 0, rows.dim, rows.rotation, _ROWS.row_address(data, shape),
        page * size, head * size, row * size,
    )  # fmt: skip
    if scales is not None and scales.shape[3]:
        side.scales = _SCALES.row_address(scales, (*shape[:3], fmt.groups(rows.dim)))
        side.scale_page_stride, side.scale_head_stride, each, _ = scales.stride()
        if each != scales.shape[3]:
            raise InputError(f"scales with strides {list(scales.stride())}: expected one by one")
    return side


def _packed_side(rows: Rows, page_size: int, key: bool) -> Side:
    fmt, data, scales = rows.fmt, rows.data, rows.scales
    layout = Layout(fmt, rows.dim, page_size, True, key)
    address = _PAGES.row_address(data, (*data.shape[:2], layout.page_bytes))
    side = Side(fmt.code, 1, rows.dim, rows.rotation, address, *data.stride()[:2])
    if scales is not None and scales.shape[2]:
        side.scales = _SCALES.row_address(scales, (*data.shape[:2], layout.page_scales))
        side.scale_page_stride, side.scale_head_stride, _ = scales.stride()
    return side
