"""The C ABI of abi.h in ctypes: structs field by field, the library's place, its status codes as typed errors."""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from homkv.errors import FormatError, HomkvError, ShapeError, UnsupportedError
from homkv.spec import HEAD_DIMS, PAGE_TOKENS, ChannelClass, PageLayout

ABI = 1  # HOMKV_CPU_ABI of abi.h
MAX_CLASSES, MAX_HEAD_DIM = 4, 256
LIBRARY_NAMES = ("libhomkv_cpu.so", "libhomkv_cpu.dylib")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

NOT_BUILT = (
    "expected the native CPU kernel, found none (it was not built): install a C++ compiler (g++ or clang++) and "
    'reinstall homkv, or pass impl="reference"'
)
OK, NO_ISA, NO_MEMORY, INDEX_RANGE = 0, 1, 2, 7
FORMAT_ERRORS = {
    3: "expected finite keys, found NaN or infinity; the model overflowed before quantization: compute it in a wider "
    "dtype",
    4: "expected finite values, found NaN or infinity; the model overflowed before quantization: compute it in a wider "
    "dtype",
    5: "expected key means within fp16 (65504), found a larger one; use --kv-cache-dtype fp16",
    6: "expected row scales up to 240, found a larger one; keys or values this large cannot be quantized: "
    "use --kv-cache-dtype fp16",
}


class ClassStruct(Structure):
    """``homkv_class``."""

    _fields_ = [(name, c_int32) for name in ("start", "width", "bits", "codes_offset", "scales_offset")]


class LayoutStruct(Structure):
    """``homkv_layout``."""

    _fields_ = [
        *((name, c_int32) for name in ("head_dim", "page_bytes", "centre_offset", "num_k", "num_v")),
        ("k", ClassStruct * MAX_CLASSES),
        ("v", ClassStruct * MAX_CLASSES),
        ("order", c_int32 * MAX_HEAD_DIM),
    ]


class AttendArgs(Structure):
    """``homkv_attend_args``."""

    _fields_ = [
        ("layout", POINTER(LayoutStruct)),
        *(
            (name, c_void_p)
            for name in (
                *("q", "pool", "page_table", "num_pages", "exact_k", "exact_v", "exact_len", "slots", "o", "lse"),
            )
        ),
        ("softmax_scale", c_float),
        *((name, c_int32) for name in ("num_blocks", "num_slots")),
        *((name, c_int32) for name in ("batch", "heads", "rows", "max_pages", "exact_tokens", "exact_dtype")),
        *((name, c_int32) for name in ("pages_per_split", "threads", "isa")),
    ]


class EncodeArgs(Structure):
    """``homkv_encode_args``."""

    _fields_ = [
        ("layout", POINTER(LayoutStruct)),
        ("k", c_void_p),
        ("v", c_void_p),
        *((name, c_int64) for name in ("k_head_stride", "k_token_stride", "v_head_stride", "v_token_stride")),
        ("pages", c_void_p),
        ("block_ids", c_void_p),
        *((name, c_int32) for name in ("num_blocks", "heads", "num_pages", "dtype", "threads", "isa")),
    ]


@dataclass(frozen=True)
class Library:
    """The loaded kernels and the instruction sets this machine can run, best first."""

    handle: ctypes.CDLL
    isas: tuple[str, ...]

    def isa_index(self, isa: str | None) -> int:
        """Index that the C side expects; -1 for the best. Raises UnsupportedError."""
        if isa is None:
            return -1
        if isa not in self.isas:
            raise UnsupportedError(f"expected isa in {self.isas} on this machine, found {isa!r}; choose one of these")
        return self.isas.index(isa)


def find_library() -> Path | None:
    """Path of the built library. Searches the package path: an editable install keeps it apart from the sources."""
    from homkv.attention import cpu

    for folder in cpu.__path__:
        for name in LIBRARY_NAMES:
            if (path := Path(folder) / name).is_file():
                return path
    return None


@cache
def load() -> Library:
    """Load the library once. Raises UnsupportedError if it is missing or was built from other sources."""
    path = find_library()
    if path is None:
        raise UnsupportedError(NOT_BUILT)
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnsupportedError(f"{NOT_BUILT} ({path.name} does not load: {error})") from error
    handle.homkv_isa_name.argtypes, handle.homkv_isa_name.restype = [c_int], c_char_p
    handle.homkv_attend.argtypes, handle.homkv_attend.restype = [POINTER(AttendArgs)], c_int
    handle.homkv_encode.argtypes, handle.homkv_encode.restype = [POINTER(EncodeArgs)], c_int
    if handle.homkv_abi() != ABI:
        raise UnsupportedError(
            f"expected a native kernel with ABI {ABI}, found {handle.homkv_abi()}; reinstall homkv to rebuild it"
        )
    names: list[str] = []
    while (name := handle.homkv_isa_name(len(names))) is not None:
        names.append(name.decode())
    return Library(handle, tuple(names))


def class_struct(cls: ChannelClass) -> ClassStruct:
    """One channel class as C sees it."""
    return ClassStruct(cls.start, cls.width, cls.bits, cls.codes_offset, cls.scales_offset)


def check_layout(layout: PageLayout) -> None:
    """Raise ShapeError unless every section of the page lies where the kernels may read it."""
    dim, centre = layout.head_dim, layout.centre_offset
    fits = dim in HEAD_DIMS and centre + 2 * dim <= layout.page_bytes
    for classes in (layout.k_classes, layout.v_classes):
        fits = fits and len(classes) <= MAX_CLASSES
        for c in classes:
            fits = fits and c.bits in (2, 4, 8) and c.width > 0 and c.width % 4 == 0 and 0 <= c.start <= dim - c.width
            fits = (
                fits and 0 <= c.codes_offset <= centre - c.code_bytes and 0 <= c.scales_offset <= centre - PAGE_TOKENS
            )
    if not fits:
        raise ShapeError(f"expected a layout made by RowsSpec.layout(), found {layout}; do not build one by hand")


@lru_cache(maxsize=256)
def layout_struct(layout: PageLayout, order: tuple[int, ...]) -> LayoutStruct:
    """The page layout and the channel order as C sees them. Read-only: shared between calls.

    Raises ShapeError unless order is a permutation of the head's channels.
    """
    check_layout(layout)
    if sorted(order) != list(range(layout.head_dim)):
        raise ShapeError(
            f"expected order to be a permutation of {layout.head_dim} channels, found {len(order)} entries "
            f"{order[:8]}...; take it from RopeSpec.channel_order()"
        )
    out = LayoutStruct(
        layout.head_dim, layout.page_bytes, layout.centre_offset, len(layout.k_classes), len(layout.v_classes)
    )
    for i, cls in enumerate(layout.k_classes):
        out.k[i] = class_struct(cls)
    for i, cls in enumerate(layout.v_classes):
        out.v[i] = class_struct(cls)
    for slot, channel in enumerate(order):
        out.order[slot] = channel
    return out


def raise_status(status: int) -> None:
    """Turn a status of the C side into the package's errors."""
    if status == OK:
        return
    if status in FORMAT_ERRORS:
        raise FormatError(FORMAT_ERRORS[status])
    if status == NO_MEMORY:
        raise MemoryError("attention scratch could not be allocated")
    raise HomkvError(f"expected status 0 from the native kernel, found {status}; please report this")
