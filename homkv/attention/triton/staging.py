"""A warp's pages, read from shared memory, where they were copied a step before, or from global memory.

Copies (``cp.async``) pass the registers by, so that pages may be as long on their way as a step takes, and reads of
shared memory are short. A copy is 16 bytes per lane, in a row, of which eight fill the 32 banks once; a fragment is
eight lanes along a row of four rows at a time, which would meet in the same banks. So bits 5 and 6 of a byte's place
are exchanged by its row (:func:`exchange`): four rows of 64, 128 or 512 bytes then differ in them.

A page is a tuple of ``[32]`` tensors: ``(address,)`` in global memory, or, if it is staged, ``(address, slot)`` with
its buffer's address in shared memory. The interpreter reads all pages from global memory.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import USE_PTX
from homkv.attention.triton.warp import load2, load4, load_short, short_load, vector_load

AWAIT = tl.constexpr("cp.async.wait_all; bar.warp.sync -1; mov.b32 $0, $1;")


def _exchange(at):
    """Exchange bits 5 and 6 of a byte's place in a page by its row."""
    return at ^ ((((at >> 7) + (at >> 9)) & 3) << 5)


exchange = triton.jit(_exchange)  # of registers
exchange_constant = triton.constexpr_function(_exchange)


@triton.constexpr_function
def whole_periods(offset):
    """The part of an offset that places do not depend on: they repeat after 2,048 bytes."""
    return offset // 2048 * 2048


@triton.constexpr_function
def room(size):
    """Bytes of a page's buffer."""
    return (size + 127) // 128 * 128


@triton.constexpr_function
def buffer_asm(size):
    """Declares shared memory and gives its address; the operand only makes it a lane's."""
    return f"{{.shared .align 128 .b8 homkv_pages[{size}]; mov.u32 $0, homkv_pages; add.u32 $0, $0, $1;}}"


@triton.constexpr_function
def copy_asm(offset, to):
    """16 bytes to a shared address, if the last operand is true."""
    return (
        f"{{.reg .pred p; setp.ne.s32 p, $3, 0; @p cp.async.cg.shared.global [$1 + {to}], [$2 + {offset}], 16; "
        "mov.b32 $0, 0;}"
    )


@triton.jit
def page_buffer(SIZE: tl.constexpr):
    """Address of SIZE bytes of shared memory, ``[32] int32``; one call per kernel."""
    none = tl.arange(0, 32) * 0
    if USE_PTX and SIZE > 0:
        asm: tl.constexpr = buffer_asm(SIZE)
        return tl.inline_asm_elementwise(asm, "=&r,r", [none], dtype=tl.int32, is_pure=False, pack=1)
    else:
        return none


@triton.jit
def place(lane, OFFSET: tl.constexpr):
    """Where byte ``lane + OFFSET`` of a page lies in its buffer, less the offset's whole periods."""
    return exchange(lane + (OFFSET - whole_periods(OFFSET)))


@triton.jit
def copy_row(page, lane, alive, SIZE: tl.constexpr, OFFSET: tl.constexpr):
    """Start copying up to 512 bytes of a page."""
    asm: tl.constexpr = copy_asm(OFFSET, whole_periods(OFFSET))
    whole: tl.constexpr = OFFSET + 512 <= SIZE
    own = alive if whole else alive & (lane + OFFSET < SIZE)
    tl.inline_asm_elementwise(
        asm, "=r,r,l,r", [page[1] + place(lane, OFFSET), page[0] + lane, own.to(tl.int32)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy_page(page, alive, SIZE: tl.constexpr):
    """Start copying a page of SIZE bytes, a multiple of 16, if ``alive``."""
    if USE_PTX:
        lane = tl.arange(0, 32) * 16
        for i in tl.static_range((SIZE + 511) // 512):
            copy_row(page, lane, alive, SIZE, 512 * i)


@triton.jit
def await_copies(STAGES: tl.constexpr):
    """Wait for all copies that were started, and for all lanes: what lies in other buffers is no longer read."""
    if USE_PTX and STAGES > 0:
        tl.inline_asm_elementwise(AWAIT, "=r,r", [tl.arange(0, 32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def read2(page, lane, OFFSET: tl.constexpr):
    """Two registers from byte ``lane + OFFSET`` on, a multiple of 8."""
    if USE_PTX and len(page) == 2:
        asm: tl.constexpr = vector_load("ld.shared", 2, whole_periods(OFFSET))
        at = page[1] + place(lane, OFFSET)
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [at], dtype=(tl.int32, tl.int32), is_pure=False, pack=1)
    else:
        return load2(page[0] + lane, OFFSET)


@triton.jit
def read4(page, lane, OFFSET: tl.constexpr):
    """Four registers from byte ``lane + OFFSET`` on, a multiple of 16."""
    if USE_PTX and len(page) == 2:
        asm: tl.constexpr = vector_load("ld.shared", 4, whole_periods(OFFSET))
        at = page[1] + place(lane, OFFSET)
        return tl.inline_asm_elementwise(
            asm, "=r,=r,=r,=r,r", [at], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
        )
    else:
        return load4(page[0] + lane, OFFSET)


@triton.jit
def read_short(page, lane, OFFSET: tl.constexpr):
    """Two bytes as an int32 from byte ``lane + OFFSET`` on; ``lane < 16`` is even, OFFSET a multiple of 16."""
    if USE_PTX and len(page) == 2:
        asm: tl.constexpr = short_load("ld.shared", exchange_constant(OFFSET))
        return tl.inline_asm_elementwise(asm, "=r,r", [page[1] + lane], dtype=tl.int32, is_pure=False, pack=1)
    else:
        return load_short(page[0] + lane, OFFSET)
