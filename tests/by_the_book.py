"""docs/format.md in plain loops: a second encoder and decoder of one page that share no line with homkv."""

from functools import cache

import numpy as np

F = np.float32
STEP = {2: F(0.9957 / 64), 4: F(0.3352 / 16)}
SMALLEST = F(2.0**-24)


def classes(digits, head_dim):
    """(start, width, bits) of every class: runs of equal digits, cut into powers of two of quarters."""
    out, quarter = [], 0
    while quarter < 4:
        run = 1
        while quarter + run < 4 and digits[quarter + run] == digits[quarter]:
            run += 1
        run = {1: 1, 2: 2, 3: 2, 4: 4}[run]
        if digits[quarter]:
            out.append((quarter * head_dim // 4, run * head_dim // 4, digits[quarter]))
        quarter += run
    return out


def sections(k_digits, v_digits, head_dim):
    """Offsets of K codes, K scales, V codes, V scales (one per class), of the centre, and the page's size."""
    at, offsets = 0, []
    for digits in (k_digits, v_digits):
        codes, scales = [], []
        for _, width, bits in classes(digits, head_dim):
            codes.append(at)
            at += width * bits * 8
        for _ in codes:
            scales.append(at)
            at += 64
        offsets += [codes, scales]
    return *offsets, at, (at + 2 * head_dim + 63) // 64 * 64


def address(is_key, width, bits, t, c):
    """Byte inside the class, and plane, of token t in slot c."""
    lane, plane = t % (8 * bits), t // (8 * bits)
    if is_key:
        return c // 4 * 4 * 8 * bits + lane * 4 + c % 4, plane
    return lane // 4 * 4 * width + c * 4 + lane % 4, plane


def scale_of(byte):
    return 2.0 ** (byte // 8 - 24) * (1 + byte % 8 / 8)


def lane_of(byte, bits, plane):
    mask, half = {2: (0xC0, 0x20), 4: (0xF0, 0x08), 8: (0xFF, 0)}[bits]
    lane = (byte << bits * plane) & mask | half
    return lane - 256 if lane > 127 else lane


@cache
def rotation(width):
    """Hadamard matrix of a class: blocks of the largest power of two that divides the width."""
    block = 1
    while width % (2 * block) == 0:
        block *= 2
    h = np.zeros((width, width))
    for i in range(width):
        for j in range(width):
            if i // block == j // block:
                h[i, j] = (-1) ** (i % block & j % block).bit_count() / np.sqrt(block)
    return h


def decode(page, k_digits, v_digits, head_dim, order):
    """Keys and values ``[64, D] float64`` of one page's bytes."""
    k_codes, k_scales, v_codes, v_scales, centre_at, size = sections(k_digits, v_digits, head_dim)
    page, both = bytes(page), []
    assert len(page) == size
    for is_key, digits, codes, scales in ((True, k_digits, k_codes, k_scales), (False, v_digits, v_codes, v_scales)):
        x = np.zeros((64, head_dim))
        for (start, width, bits), code_at, scale_at in zip(classes(digits, head_dim), codes, scales, strict=True):
            for t in range(64):
                row = []
                for c in range(width):
                    byte, plane = address(is_key, width, bits, t, c)
                    row.append(lane_of(page[code_at + byte], bits, plane))
                x[t, start : start + width] = rotation(width).T @ (scale_of(page[scale_at + t]) * np.array(row))
        both.append(x)
    slots, v = both
    slots += np.frombuffer(page[centre_at : centre_at + 2 * head_dim], dtype="<f2").astype(np.float64)
    k = np.zeros_like(slots)
    for slot, channel in enumerate(order):
        k[:, channel] = slots[:, slot]
    return k, v


def total(x):
    """Sum in the order of the document."""
    n = 1
    while n < len(x):
        n *= 2
    x = [*x, *[F(0)] * (n - len(x))]
    while len(x) > 1:
        half = len(x) // 2
        x = [x[i] + x[i + half] for i in range(half)]
    return x[0]


def rotate(x):
    """Hadamard in float32, butterfly by butterfly; ``x [w]``."""
    x, block = list(x), len(x) & -len(x)
    h = 1
    while h < block:
        for i in range(len(x)):
            if not i & h:
                x[i], x[i + h] = x[i] + x[i + h], x[i] - x[i + h]
        h *= 2
    return np.array(x, F) * F(1 / np.sqrt(np.float64(block)))


def bits_of(s):
    return int(np.array(s, F).view(np.uint32))


def code(y, s, bits):
    u = y * (F(1) / s)
    if bits == 8:
        return np.clip(np.rint(u), -127, 127).astype(F)
    step = {2: 64, 4: 16}[bits]
    return (np.clip(np.floor(u * F(1 / step)), -128 // step, 128 // step - 1) * step + step // 2).astype(F)


def fit(y, bits):
    """Lane values and scale byte of one row."""
    if bits == 8:
        s = max(np.abs(y).max() * F(1 / 127), SMALLEST)
        byte = ((bits_of(s) + 2**20 - 1) >> 20) - (103 << 3)
    else:
        s = max(np.sqrt(total(y * y) * F(1 / len(y))) * STEP[bits], SMALLEST)
        for _ in range(2):
            lane = code(y, s, bits)
            s = max(total(lane * y) / total(lane * lane), SMALLEST)
        byte = min(max(((bits_of(s) + 2**19) >> 20) - (103 << 3), 0), 255)
    return code(y, F(scale_of(byte)), bits), byte


def encode(k, v, k_digits, v_digits, head_dim, order):
    """One page's bytes from keys and values ``[64, D] float32``."""
    k_codes, k_scales, v_codes, v_scales, centre_at, size = sections(k_digits, v_digits, head_dim)
    page = bytearray(size)
    slots = k[:, order]
    centre = np.array([total(slots[:, s]) * F(1 / 64) for s in range(head_dim)], F).astype("<f2")
    page[centre_at : centre_at + 2 * head_dim] = centre.tobytes()
    residual = slots - centre.astype(F)
    parts = ((True, residual, k_digits, k_codes, k_scales, F(0)), (False, v, v_digits, v_codes, v_scales, F(0.25)))
    for is_key, x, digits, codes, scales, diffusion in parts:
        for (start, width, bits), code_at, scale_at in zip(classes(digits, head_dim), codes, scales, strict=True):
            error = np.zeros(width, F)
            for t in range(64):
                y = rotate(x[t, start : start + width]) + diffusion * error
                lane, page[scale_at + t] = fit(y, bits)
                error = y - F(scale_of(page[scale_at + t])) * lane
                mask = (0xFF << (8 - bits)) & 0xFF
                for c in range(width):
                    byte, plane = address(is_key, width, bits, t, c)
                    page[code_at + byte] |= (int(lane[c]) & mask) >> bits * plane
    return bytes(page)
