"""The instructions on a warp's registers, against what they are said to compute: PTX on a GPU, else plain forms."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.warp import (
    across,
    from_lane,
    lane_parts,
    load2,
    load4,
    load_short,
    max_over_rows,
    mma8,
    mma16,
    pack_bytes,
    pack_halves,
    sum_over_rows,
    transpose_bytes,
)

LANES = 32


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(5))


def fragment(x: Tensor, width: int) -> Tensor:
    """Registers ``[count, 32]`` of a left operand ``[16, K]``: (row g, then g + 8) of either half."""
    k = x.shape[1] // 2
    parts = [x[8 * row : 8 * row + 8, k * half : k * half + k] for half in (0, 1) for row in (0, 1)]
    return torch.stack([part.reshape(LANES, width).contiguous().view(torch.int32).flatten() for part in parts])


def accumulator(registers: Tensor) -> Tensor:
    """The ``[16, 8]`` matrix of four registers ``[4, 32]``."""
    rows = registers.reshape(2, 2, 8, 4).permute(0, 2, 3, 1)
    return rows.reshape(16, 8)


@triton.jit
def product_kernel(A, B, C, Out, FLOAT: tl.constexpr, UNSIGNED: tl.constexpr):
    lane = tl.arange(0, 32)
    a = (tl.load(A + lane), tl.load(A + 32 + lane), tl.load(A + 64 + lane), tl.load(A + 96 + lane))
    c = (tl.load(C + lane), tl.load(C + 32 + lane), tl.load(C + 64 + lane), tl.load(C + 96 + lane))
    b0 = tl.load(B + lane)
    b1 = tl.load(B + 32 + lane)
    d = mma16(a, b0, b1, c) if FLOAT else mma8(a, b0, b1, c, UNSIGNED)
    for i in tl.static_range(4):
        tl.store(Out + 32 * i + lane, d[i])


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_product_of_bytes(unsigned: bool, device: torch.device) -> None:
    a, b = random_bytes(16, 32), random_bytes(8, 32)
    wide = b.view(torch.uint8).int() if unsigned else b.int()
    halves = torch.stack([b[:, k : k + 16].reshape(LANES, 4).contiguous().view(torch.int32).flatten() for k in (0, 16)])
    c, out = torch.arange(128, dtype=torch.int32).reshape(4, LANES), torch.empty(4, LANES, dtype=torch.int32)
    out = out.to(device)
    product_kernel[(1,)](fragment(a, 4).to(device), halves.to(device), c.to(device), out, False, unsigned, num_warps=1)
    assert torch.equal(accumulator(out.cpu()), accumulator(c) + a.int() @ wide.T)


def test_the_product_of_halves(device: torch.device) -> None:
    a, b = random_bytes(16, 16).half(), random_bytes(8, 16).half()  # small integers: sums are exact
    halves = torch.stack([b[:, k : k + 8].reshape(LANES, 2).contiguous().view(torch.int32).flatten() for k in (0, 8)])
    c, out = torch.arange(128.0).reshape(4, LANES), torch.empty(4, LANES, device=device)
    product_kernel[(1,)](fragment(a, 2).to(device), halves.to(device), c.to(device), out, True, False, num_warps=1)
    assert torch.equal(accumulator(out.cpu()), accumulator(c) + a.float() @ b.float().T)


@triton.jit
def moves_kernel(X, Floats, Out, FloatsOut):
    lane = tl.arange(0, 32)
    g, q = lane_parts()
    x = (tl.load(X + lane), tl.load(X + 32 + lane), tl.load(X + 64 + lane), tl.load(X + 96 + lane))
    f = tl.load(Floats + lane)
    address = X.to(tl.int64, bitcast=True) + lane * 16
    four = load4(address, 0)
    two = load2(address, 8)
    tl.store(Out + lane, transpose_bytes(x))
    tl.store(Out + 32 + lane, pack_bytes(x))
    tl.store(Out + 64 + lane, pack_halves(f, -f))
    tl.store(Out + 96 + lane, g * 4 + q)
    tl.store(Out + 128 + lane, load_short(address, 6))
    for i in tl.static_range(4):
        tl.store(Out + 160 + lane * 4 + i, four[i])
    for i in tl.static_range(2):
        tl.store(Out + 288 + lane * 2 + i, two[i])
    tl.store(FloatsOut + lane, across(f, 4))
    tl.store(FloatsOut + 32 + lane, from_lane(f, 31 - lane))
    tl.store(FloatsOut + 64 + lane, max_over_rows(f))
    tl.store(FloatsOut + 96 + lane, sum_over_rows(f))


def test_moves_between_lanes(device: torch.device) -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (4, LANES), dtype=torch.int32, generator=torch.Generator().manual_seed(6))
    f = torch.randint(-999, 999, (LANES,), generator=torch.Generator().manual_seed(7)).float()  # exact in float16
    out, floats = torch.empty(352, dtype=torch.int32, device=device), torch.empty(4, LANES, device=device)
    moves_kernel[(1,)](x.to(device), f.to(device), out, floats, num_warps=1)
    out, floats = out.cpu(), floats.cpu()
    low = x & 255
    columns = accumulator(low).T.reshape(8, 2, 8).transpose(1, 2)  # column, row in 8, which 8
    assert torch.equal(out[:32], as_int32(columns.reshape(LANES, 4)))
    assert torch.equal(out[32:64], as_int32(low.T))
    assert torch.equal(out[64:96], torch.stack((f, -f), 1).half().view(torch.int32).flatten())
    assert torch.equal(out[96:128], torch.arange(32, dtype=torch.int32))
    assert torch.equal(out[128:160], x.flatten()[1::4].cpu() >> 16 & 65535)
    assert torch.equal(out[160:288], x.flatten())
    assert torch.equal(out[288:].reshape(LANES, 2), x.reshape(LANES, 4)[:, 2:])
    lane, by_row = torch.arange(LANES), f.reshape(8, 4)
    assert torch.equal(floats[0], f[lane ^ 4])
    assert torch.equal(floats[1], f.flip(0))
    assert torch.equal(floats[2], by_row.amax(0).repeat(8))
    assert torch.equal(floats[3], by_row.sum(0).repeat(8))


def as_int32(parts: Tensor) -> Tensor:
    """Four bytes per row, the lowest first, as one int32 each."""
    return parts.to(torch.uint8).contiguous().view(torch.int32).flatten()
