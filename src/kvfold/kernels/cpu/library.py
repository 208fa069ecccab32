"""The compiled CPU kernels: found, loaded, and called with plain pointers (``cpu/kernel.h``)."""

import ctypes
import os
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvfold.errors import InputError
from kvfold.kernels.cpu.build import NAME
from kvfold.kernels.cpu.header import fields_of
from kvfold.kernels.cpu.pointer import Buffer, Int32s
from kvfold.ops.formats import FORMATS, format_of

AUTO = "auto"
_TABLE = Buffer("page table", torch.int32)


class Side(Structure):
    """``KvfSide``: keys or values of a store."""

    _fields_ = fields_of("KvfSide")


class Part(Structure):
    """``KvfPart``: a store and which positions of each sequence it holds."""

    _fields_ = fields_of("KvfPart", {"KvfSide": Side})

    @classmethod
    def of(
        cls,
        k: Side,
        v: Side,
        table: torch.Tensor,
        page_size: int,
        begin: Int32s | None,
        end: Int32s,
    ) -> "Part":
        """A part of ``table`` int32 ``[B, pages]`` and B ranges, or one for each KV head.

        What it points to must outlive the calls that read it.

        Raises:
            InputError: if the table is another kind of tensor, or the ranges are not B.
        """
        shape, strides = table.shape, table.stride()
        rows, ranges, each, table_head, step = _TABLE.row_address(table, shape), shape[0], 1, 0, 0
        if len(shape) == 3:
            each, table_head, step = shape[1], strides[1], 1
            ranges *= each
        first = None
        if begin is not None:
            first = begin.address
        if end.count != ranges or (begin is not None and begin.count != ranges):
            raise InputError(f"{end.count} ranges of positions for {shape[0]} sequences")
        return cls(k, v, rows, strides[0], table_head, page_size, first, end.address, each, step)


class Tensor(Structure):
    """``KvfTensor``: ``[B, H, T, dim]``."""

    _fields_ = fields_of("KvfTensor")

    @classmethod
    def of(cls, x: torch.Tensor, shape: tuple[int, ...], buffer: Buffer) -> "Tensor":
        """A tensor of float32, float16 or bfloat16, whose rows are contiguous."""
        data = buffer.row_address(x, shape)
        batch, head, token, _ = x.stride()
        return cls(data, format_of(x.dtype).code, batch, head, token)


class Attend(Structure):
    """``KvfAttend``: one call of attention."""

    _fields_ = fields_of("KvfAttend", {"KvfTensor": Tensor, "KvfPart": Part})


class Append(Structure):
    """``KvfAppend``: rows to be written."""

    _fields_ = fields_of("KvfAppend", {"KvfTensor": Tensor, "KvfPart": Part})


class ReadBack(Structure):
    """``KvfReadBack``: rows to be read back."""

    _fields_ = fields_of("KvfReadBack", {"KvfTensor": Tensor, "KvfPart": Part})


class Select(Structure):
    """``KvfSelect``: pages to be chosen."""

    _fields_ = fields_of("KvfSelect", {"KvfTensor": Tensor, "KvfSide": Side})


class Move(Structure):
    """``KvfMove``: tokens to be moved."""

    _fields_ = fields_of("KvfMove", {"KvfPart": Part})


class Choice(NamedTuple):
    """Which copy of the kernels takes calls of a kind (``CallKind`` of ``cpu/trial.h``)."""

    keys: str  #: formats
    values: str
    queries: str
    head_dim: int
    v_head_dim: int
    rows: int  #: that share a KV head, 0 for many
    far: bool
    isa: str

    @classmethod
    def of(cls, line: str) -> "Choice":
        """One line of ``kvf_choices``."""
        *numbers, isa = line.split()
        k, v, q, dim, v_dim, rows, far = map(int, numbers)
        names = list(FORMATS)
        return cls(names[k], names[v], names[q], dim, v_dim, rows, bool(far), isa)


#: ``double timer(name of an instruction set, call)`` stands in for measuring.
TIMER = ctypes.CFUNCTYPE(c_double, c_char_p, POINTER(Attend))


class Library:
    """The loaded library; ``c`` are its functions. ``asked`` is what ``use`` was told last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = AUTO
        self.c = ctypes.CDLL(str(path))
        self.c.kvf_isa.restype = c_char_p
        self.c.kvf_isas.restype = c_char_p
        self.c.kvf_set_isa.argtypes = [c_char_p]
        self.c.kvf_set_parallel.argtypes = [c_void_p]
        self.c.kvf_attend.argtypes = [POINTER(Attend)]
        self.c.kvf_append.argtypes = [POINTER(Append)]
        self.c.kvf_read.argtypes = [c_void_p, c_int64, c_int32]
        self.c.kvf_read.restype = c_double
        self.c.kvf_sizeof.restype = c_int64
        if not self._is_of_these_sources():
            raise OSError(f"{path.name} was built from other sources; reinstall kvfold")
        self._share_threads()

    def _is_of_these_sources(self) -> bool:
        """Whether it has the same structs and formats: it would misread others' memory."""
        structs = Side, Part, Tensor, Attend, Append, ReadBack, Select, Move
        if any(self.c.kvf_sizeof(i) != ctypes.sizeof(s) for i, s in enumerate(structs)):
            return False
        newer = "formats", "read_back", "choices", "set_timer", "select", "move"
        if not all(hasattr(self.c, f"kvf_{name}") for name in newer):
            return False
        self.c.kvf_choices.argtypes = [c_void_p, c_int64]
        self.c.kvf_choices.restype = c_int64
        self.c.kvf_set_timer.argtypes = [c_void_p]
        self.c.kvf_read_back.argtypes = [POINTER(ReadBack)]
        self.c.kvf_select.argtypes = [POINTER(Select)]
        self.c.kvf_move.argtypes = [POINTER(Move)]
        self.c.kvf_formats.restype = c_char_p
        formats: bytes = self.c.kvf_formats()
        return formats.decode().split() == list(FORMATS)

    def _share_threads(self) -> None:
        """Run on PyTorch's own OpenMP threads: two pools would wait on each other's cores."""
        run = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        self.shares_threads = run is not None
        if run is not None:
            self.c.kvf_set_parallel(ctypes.cast(run, c_void_p))

    @property
    def isa(self) -> str:
        """The instruction set that was asked for, or the best, where no trial says otherwise."""
        name: bytes = self.c.kvf_isa()
        return name.decode()

    @property
    def isas(self) -> list[str]:
        """All instruction sets that this machine has kernels for, best first."""
        names: bytes = self.c.kvf_isas()
        return names.decode().split()

    def use(self, isa: str) -> None:
        """Use one instruction set for everything; "auto": for each kind of call the fastest.

        Raises:
            InputError: if this machine does not have it.
        """
        if self.c.kvf_set_isa(isa.encode()):
            choices = ", ".join([*self.isas, AUTO])
            raise InputError(f"no kernels for {isa!r} on this machine", f"choose one of {choices}")
        self.asked = isa

    def choices(self) -> list[Choice]:
        """What trials chose so far, by kinds of calls; empty where nothing was left to choose."""
        room = 1 << 17
        text = ctypes.create_string_buffer(room)
        size = self.c.kvf_choices(text, room)
        return [Choice.of(line) for line in text.raw[:size].decode().splitlines()]

    @property
    def in_use(self) -> str:
        """Every instruction set that took calls so far, as measurements should say."""
        chosen = {choice.isa for choice in self.choices()} if self.asked == AUTO else set()
        return " ".join(isa for isa in self.isas if isa in chosen) or self.isa

    def set_timer(self, timer: Any = None) -> None:
        """Forget what was chosen, and let a ``TIMER`` say how fast each copy is; None: trials."""
        self.c.kvf_set_timer(None if timer is None else ctypes.cast(timer, c_void_p))

    def attend(self, call: Attend) -> None:
        call.threads = torch.get_num_threads()
        self.c.kvf_attend(byref(call))

    def append(self, call: Append) -> None:
        call.threads = torch.get_num_threads()
        self.c.kvf_append(byref(call))

    def read_back(self, call: ReadBack) -> None:
        call.threads = torch.get_num_threads()
        self.c.kvf_read_back(byref(call))

    def select(self, call: Select) -> None:
        call.threads = torch.get_num_threads()
        self.c.kvf_select(byref(call))

    def move(self, call: Move) -> None:
        call.threads = torch.get_num_threads()
        self.c.kvf_move(byref(call))

    def read(self, data: torch.Tensor) -> None:
        """Read a tensor's memory once, as fast as the machine can; for measuring bandwidth."""
        address = Buffer("data", data.dtype).address(data, data.shape)
        self.c.kvf_read(address, data.nbytes, torch.get_num_threads())


_FOLDER = Path(__file__).parents[1]


@cache
def library() -> Library | None:
    """The compiled kernels, or None where they were not built (see ``why_missing``)."""
    path = Path(os.environ.get("KVFOLD_KERNELS", _FOLDER / NAME))
    try:
        found = Library(path) if path.is_file() else None
    except OSError:
        return None
    isa = os.environ.get("KVFOLD_ISA")
    if found is not None and isa:
        found.use(isa)
    return found


def why_missing() -> str:
    """Why ``library`` is None, and what to do about it."""
    path = Path(os.environ.get("KVFOLD_KERNELS", _FOLDER / NAME))
    if not path.is_file():
        return "not built; install a C++ compiler (g++ or clang++) and reinstall kvfold"
    try:
        Library(path)
    except OSError as error:
        return f"{error}"
    return "available"
