"""The kernel that copies between a slot and many pieces. Imports only where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_BLOCKS_PER_PIECE = 8
_ELEMENTS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


# Its parameters have no annotations but constexpr: Triton's compiler, unlike its interpreter, looks them up.
@triton.jit  # type: ignore[untyped-decorator]
def _copy(p_table, p_slot, PACK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # p_table: [pieces, 3] int64, p_slot: [elements]; program (piece, share of it)
    i_piece = tl.program_id(0)
    address = tl.load(p_table + 3 * i_piece)
    p_here = p_slot + tl.load(p_table + 3 * i_piece + 1)
    length = tl.load(p_table + 3 * i_piece + 2)
    p_piece = address.to(p_slot.dtype)
    for start in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        m = i < length
        if PACK:
            tl.store(p_here + i, tl.load(p_piece + i, mask=m), mask=m)
        else:
            tl.store(p_piece + i, tl.load(p_here + i, mask=m), mask=m)


def copy(table: torch.Tensor, width: int, slot: torch.Tensor, pack: bool) -> None:
    """Copy all pieces of a table of `weft_nvshmem.packing` into the slot (`pack`) or out of it, in the current stream.

    `table` is int64 [pieces, 3] on the slot's device; `slot` uint8, aligned to 8 bytes.
    """
    _copy[len(table), _BLOCKS_PER_PIECE](table, slot.view(_ELEMENTS[width]), PACK=pack, BLOCK=_BLOCK)
