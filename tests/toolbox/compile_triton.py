"""Compile the Triton kernels for a GPU that need not be there: what ``test_triton_compile`` runs.

    python -m tests.toolbox.compile_triton cuda 90

Prints one JSON line for each cache format: what the compiled decoding kernel does with memory.
"""

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvfold.kernels.triton.append import append_kernel
from kvfold.kernels.triton.decode import attend_kernel, merge_kernel
from kvfold.kernels.triton.launch import tile_of
from kvfold.kernels.view import KVView, Rows
from kvfold.ops.formats import FORMATS
from kvfold.ops.options import FIELDS

POINTED = {"bfloat16": "*bf16", "int8": "*i8", "uint8": "*u8"}
STORED = [name for name, fmt in FORMATS.items() if not fmt.plain or name == "bf16"]
_TYPES = {torch.int32: "*i32", torch.float32: "*fp32"}
POINTERS = {
    "Q": "*bf16", "KS": "*bf16", "VS": "*bf16", "TABLE": "*i32", "BEGIN": "*i32", "END": "*i32",
    "LENGTH": "*i32", "FIRST": "*i32", "MASK": "*u8",
    "LSE": "*fp32", "PARTS": "*fp32", "PART_LSE": "*fp32", "COS": "*fp32",
    "SIN": "*fp32", "X": "*bf16", "SCALES": "*bf16",
    **{n.upper(): _TYPES[k.dtype] for n, k in FIELDS.items() if k.dtype is not None},
}  # fmt: skip
FLOATS = [name for name, kind in FIELDS.items() if kind.schema == "float?"]
ALIGNED = ("_page", "_head", "_row", "_batch", "_token")  # strides that 16 divides


def compiled(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], target: Any,
    warps: int = 4, stages: int = 3,
) -> Any:  # fmt: skip
    """A kernel, as the launcher would have it compiled."""
    names = kernel.arg_names
    known = POINTERS | types
    signature = {
        n: "constexpr" if n in constants else known.get(n, "fp32" if n in FLOATS else "i32")
        for n in names
    }
    aligned = [i for i, n in enumerate(names) if signature[n][0] == "*" or n.endswith(ALIGNED)]
    source = ASTSource(
        kernel,
        signature,
        {(i,): constants[n] for i, n in enumerate(names) if n in constants},
        {(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in constants},
    )
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def attend(name: str, target: Any) -> Any:
    """Decoding for heads of 128 in one format, with everything switched on."""
    fmt = FORMATS[name]
    groups, width, halves = fmt.groups(128), fmt.row_bytes(128) // fmt.dtype.itemsize, fmt.bits == 4
    stored = POINTED[fmt.stored]
    constants = {
        "head_dim": 128, "v_head_dim": 128, "rope_dim": 0, "k_width": width, "v_width": width,
        "k_groups": groups, "v_groups": groups, "SPLITS": 8,
        "M": 16, "N": 64, "D": 128, "DV": 128, "ROPE": 0, "K_GROUPS": max(1, groups),
        "V_GROUPS": max(1, groups), "K_FORMAT": fmt.code, "V_FORMAT": fmt.code, "K_HALVES": halves,
        "V_HALVES": halves, "DOT": tl.bfloat16,
        "PRECISION": "tf32", "ONE_PAGE": True, "MASK_KIND": 1,
    }  # fmt: skip
    constants |= {n: True for n in attend_kernel.arg_names if n.startswith("HAS_")}
    return compiled(attend_kernel, constants, {"K": stored, "V": stored, "OUT": "*fp32"}, target)


def latents(name: str, shared: int, target: Any, wide: bool = False) -> Any:
    """Decoding of 64 heads over latents of 512 + 64, where a program may have so much memory.

    Args:
        wide: queries are float32.
    """
    fmt, whole, rank = FORMATS[name], 576, 512
    groups = fmt.groups(whole)
    data, scales = torch.empty(1, 1, 1, whole, dtype=fmt.dtype), torch.empty(1, 1, 1, groups)
    keys, values = Rows(fmt, data, scales, whole), Rows(fmt, data[..., :rank], scales, rank)
    tile = tile_of(KVView(keys, values, torch.zeros(1, 1), 1, None, [1], 1), 64, shared, wide)
    constants = {
        "head_dim": rank, "v_head_dim": rank, "rope_dim": 64, "k_width": rank, "v_width": rank,
        "k_groups": groups, "v_groups": groups, "SPLITS": 8, "M": tile.rows, "N": tile.keys,
        "D": rank, "DV": rank, "ROPE": 64, "K_GROUPS": 1, "V_GROUPS": 1, "K_FORMAT": fmt.code,
        "V_FORMAT": fmt.code, "K_HALVES": False, "V_HALVES": False,
        "DOT": tl.float32 if wide else tl.bfloat16, "PRECISION": "ieee" if wide else "tf32",
        "ONE_PAGE": True, "MASK_KIND": 0,
    }  # fmt: skip
    constants |= {n: False for n in attend_kernel.arg_names if n.startswith("HAS_")}
    stored = POINTED[fmt.stored]
    types = {"K": stored, "V": stored, "OUT": "*fp32", "Q": "*fp32" if wide else "*bf16"}
    return compiled(attend_kernel, constants, types, target, tile.warps, tile.stages)


def append(name: str, target: Any) -> Any:
    fmt = FORMATS[name]
    constants = {
        "D": 128, "GROUPS": max(1, fmt.groups(128)), "FORMAT": fmt.code, "PLAIN": fmt.plain,
        "HALVES": fmt.bits == 4, "ROTATION": fmt.rotation(128),
        "ROTARY": True, "INTERLEAVED": False,
    }  # fmt: skip
    return compiled(append_kernel, constants, {"DATA": POINTED[fmt.stored]}, target)


def main() -> None:
    backend, arch = sys.argv[1:]
    nvidia = backend == "cuda"
    target = GPUTarget(backend, int(arch) if nvidia else arch, 32 if nvidia else 64)
    constants = {"SLOTS": 16, "DV": 128, "HAS_SINK_LOGITS": True}
    compiled(merge_kernel, constants, {"OUT": "*bf16"}, target)
    for name in STORED:
        append(name, target)
        assembly = attend(name, target).asm.get("ptx", "")
        wide = sum(assembly.count(word) for word in ("cp.async.cg", "ld.global.v4"))
        print(json.dumps({"format": name, "wide": wide, "ahead": assembly.count("cp.async")}))
    for allowed in (64, 99, 227) if nvidia else (64,):
        for name, wide in (("bf16", False), ("int8", False), ("bf16", True))[: 2 + (allowed == 99)]:
            shared = latents(name, allowed << 10, target, wide).metadata.shared
            print(json.dumps({"latent": name, "allowed": allowed << 10, "shared": shared}))


if __name__ == "__main__":
    main()
