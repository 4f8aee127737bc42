"""Nothing a caller passes may crash the native kernel: every mistake is a typed error that names the remedy."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from native_cases import needs_kernel
from torch import Tensor

from homkv.attention import api, cpu
from homkv.attention.cpu import binding
from homkv.attention.view import LayerView
from homkv.errors import DTypeError, HomkvError, ShapeError, UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.spec import PAGE_TOKENS, RowsSpec
from homkv.testing.inputs import make_view

CODEC = RowsCodec(64, RowsSpec.parse("balanced"))
Change = Callable[[LayerView], LayerView]


@cache
def view_of(lengths: tuple[int, ...] = (300, 140)) -> LayerView:
    return make_view(CODEC, list(lengths), 2, exact_dtype=torch.float32)


def edited(name: str, edit: Callable[[Tensor], Tensor | None]) -> Change:
    """A view whose tensor ``name`` was replaced by what ``edit`` returns, or edited in place."""

    def change(view: LayerView) -> LayerView:
        tensor = getattr(view, name).clone()
        result = edit(tensor)
        return replace(view, **{name: tensor if result is None else result})

    return change


def put(value: int) -> Callable[[Tensor], None]:
    def edit(x: Tensor) -> None:
        x.view(-1)[0] = value

    return edit


BAD_VIEWS: list[tuple[str, Change, type[HomkvError], str]] = [
    ("pool dtype", edited("pool", lambda x: x.to(torch.int8)), DTypeError, "pool of uint8"),
    ("pool shape", edited("pool", lambda x: x[0]), ShapeError, "pool of 3 dimensions"),
    ("pool strides", edited("pool", lambda x: x.transpose(0, 1)), ShapeError, "contiguous"),
    ("page size", edited("pool", lambda x: x[..., :-64].contiguous()), ShapeError, "another format"),
    ("heads", edited("pool", lambda x: x[:, :1].contiguous()), ShapeError, "exact_k and exact_v"),
    ("table dtype", edited("page_table", lambda x: x.long()), DTypeError, "page_table of int32"),
    ("block too large", edited("page_table", put(10_000)), ShapeError, "page_table entries in 0"),
    ("block negative", edited("page_table", put(-1)), ShapeError, "blocks of the pool"),
    ("too many pages", edited("num_pages", put(1_000)), ShapeError, "columns of page_table"),
    ("negative pages", edited("num_pages", put(-1)), ShapeError, "num_pages in 0"),
    ("too few counts", edited("num_pages", lambda x: x[:1]), ShapeError, "one entry per sequence"),
    ("exact too long", edited("exact_len", put(133)), ShapeError, "exact_len in 0..132"),
    ("exact negative", edited("exact_len", put(-5)), ShapeError, "tokens of exact_k"),
    ("slot too large", edited("slots", put(3)), ShapeError, "slots in 0..2"),
    ("slot negative", edited("slots", put(-1)), ShapeError, "rows of exact_k"),
    ("exact dtype", edited("exact_k", lambda x: x.double()), DTypeError, "exact_k of float32"),
    ("exact dtypes differ", edited("exact_v", lambda x: x.half()), DTypeError, "exact_v of float32"),
    ("exact shapes differ", edited("exact_v", lambda x: x[:, :, :8].contiguous()), ShapeError, "exact_k and exact_v"),
    ("exact strides", edited("exact_k", lambda x: x.transpose(1, 2)), ShapeError, "contiguous"),
]


@needs_kernel
@pytest.mark.parametrize(
    ("change", "error", "message"), [row[1:] for row in BAD_VIEWS], ids=[row[0] for row in BAD_VIEWS]
)
def test_a_view_that_does_not_fit_is_refused(change: Change, error: type[HomkvError], message: str) -> None:
    with pytest.raises(error, match=message):
        cpu.attend(torch.ones(2, 4, 1, 64), change(view_of()), CODEC.layout, CODEC.order, 1.0)


@needs_kernel
def test_entries_behind_the_end_of_a_table_do_not_matter() -> None:
    view = edited("page_table", lambda x: x.index_fill(0, torch.tensor([1]), 123_456))(view_of((300, 0)))
    assert int(view.num_pages[1]) == 0
    o, _ = cpu.attend(torch.ones(2, 4, 1, 64), view, CODEC.layout, CODEC.order, 0.1)
    assert bool(torch.isfinite(o).all())


@needs_kernel
@pytest.mark.parametrize(
    ("q", "error"),
    [
        (torch.ones(2, 4, 64), ShapeError),
        (torch.ones(3, 4, 1, 64), ShapeError),
        (torch.ones(2, 5, 1, 64), ShapeError),
        (torch.ones(2, 4, 1, 128), ShapeError),
        (torch.ones(2, 4, 1, 64, dtype=torch.int32), DTypeError),
        (torch.ones(2, 4, 1, 64, device="meta"), DTypeError),
    ],
)
def test_a_query_that_does_not_fit_is_refused(q: Tensor, error: type[HomkvError]) -> None:
    with pytest.raises(error, match="expected"):
        cpu.attend(q, view_of(), CODEC.layout, CODEC.order, 1.0)


@needs_kernel
@pytest.mark.parametrize("shape", [(2, 0, 1, 64), (2, 4, 0, 64)])
def test_no_query_rows_give_no_output(shape: tuple[int, ...]) -> None:
    o, lse = cpu.attend(torch.ones(shape), view_of(), CODEC.layout, CODEC.order, 1.0)
    assert o.shape == shape
    assert lse.shape == shape[:3]


@needs_kernel
@pytest.mark.parametrize(
    ("order", "error"),
    [
        (torch.zeros(64, dtype=torch.int64), ShapeError),
        (torch.arange(63), ShapeError),
        (torch.arange(1, 65), ShapeError),
        (torch.arange(64.0), DTypeError),
    ],
)
def test_an_order_that_is_no_permutation_is_refused(order: Tensor, error: type[HomkvError]) -> None:
    with pytest.raises(error, match=r"RopeSpec\.channel_order"):
        cpu.attend(torch.ones(2, 4, 1, 64), view_of(), CODEC.layout, order, 1.0)
    with pytest.raises(error, match=r"RopeSpec\.channel_order"):
        cpu.encode(torch.ones(1, 64, 64), torch.ones(1, 64, 64), CODEC.layout, order)


@needs_kernel
def test_a_layout_made_by_hand_is_refused() -> None:
    first = CODEC.layout.v_classes[0]
    beyond = replace(CODEC.layout, v_classes=(replace(first, codes_offset=CODEC.layout.page_bytes - PAGE_TOKENS),))
    with pytest.raises(ShapeError, match=r"RowsSpec\.layout"):
        cpu.encode(torch.ones(1, 64, 64), torch.ones(1, 64, 64), beyond, CODEC.order)


@needs_kernel
@pytest.mark.parametrize(
    ("k", "v", "error", "message"),
    [
        (torch.ones(1, 63, 64), torch.ones(1, 63, 64), ShapeError, "whole pages"),
        (torch.ones(64, 64), torch.ones(64, 64), ShapeError, "whole pages"),
        (torch.ones(1, 64, 64), torch.ones(1, 128, 64), ShapeError, "whole pages"),
        (torch.ones(1, 64, 80), torch.ones(1, 64, 80), ShapeError, "whole pages"),
        (torch.ones(1, 64, 64).double(), torch.ones(1, 64, 64).double(), DTypeError, "float32, float16 or bfloat16"),
        (torch.ones(1, 64, 64).half(), torch.ones(1, 64, 64), DTypeError, "both"),
        (torch.ones(1, 64, 64).transpose(1, 2), torch.ones(1, 64, 64), ShapeError, "contiguous last dimension"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(k: Tensor, v: Tensor, error: type[HomkvError], message: str) -> None:
    with pytest.raises(error, match=message):
        cpu.encode(k, v, CODEC.layout, CODEC.order)


@needs_kernel
@pytest.mark.parametrize(
    ("shape", "block_ids", "error", "message"),
    [
        ((3, 1), None, ShapeError, "expected out"),
        ((3, 2), [0, 1], ShapeError, "expected out"),
        ((3, 1), [0], ShapeError, "2 different block_ids"),
        ((3, 1), [1, 1], ShapeError, "2 different block_ids"),
        ((3, 1), [0, 3], ShapeError, "block_ids in 0..2"),
        ((3, 1), [-1, 0], ShapeError, "block_ids in 0..2"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(
    shape: tuple[int, int], block_ids: list[int] | None, error: type[HomkvError], message: str
) -> None:
    pool = torch.full((*shape, CODEC.page_bytes), 0xA5, dtype=torch.uint8)
    ids = None if block_ids is None else torch.tensor(block_ids, dtype=torch.int32)
    with pytest.raises(error, match=message):
        cpu.encode(torch.ones(1, 128, 64), torch.ones(1, 128, 64), CODEC.layout, CODEC.order, out=pool, block_ids=ids)
    assert bool((pool == 0xA5).all())


@needs_kernel
def test_block_ids_of_another_dtype_are_refused() -> None:
    pool = torch.zeros(2, 1, CODEC.page_bytes, dtype=torch.uint8)
    with pytest.raises(DTypeError, match="block_ids of int32"):
        cpu.encode(
            *(torch.ones(1, 64, 64), torch.ones(1, 64, 64), CODEC.layout, CODEC.order),
            out=pool,
            block_ids=torch.tensor([1]),
        )


@needs_kernel
def test_unknown_instruction_sets_and_no_threads_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="portable"):
        cpu.attend(torch.ones(2, 4, 1, 64), view_of(), CODEC.layout, CODEC.order, 1.0, isa="mmx")
    with pytest.raises(ShapeError, match="at least 1"):
        cpu.attend(torch.ones(2, 4, 1, 64), view_of(), CODEC.layout, CODEC.order, 1.0, num_threads=0)


@needs_kernel
def test_every_instruction_set_is_listed_best_first() -> None:
    assert cpu.available_isas()[-1] == "portable"
    assert cpu.best_isa() == cpu.available_isas()[0]
    assert set(cpu.available_isas()) <= {"avx512-vnni", "avx2", "neon-dot", "portable"}


@pytest.mark.parametrize(
    ("status", "error"), [(1, HomkvError), (2, MemoryError), (3, HomkvError), (6, HomkvError), (99, HomkvError)]
)
def test_every_status_is_an_error(status: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        binding.raise_status(status)
    binding.raise_status(binding.OK)


@pytest.fixture
def _fresh_loader() -> Iterator[None]:
    binding.load.cache_clear()
    yield
    binding.load.cache_clear()


@pytest.mark.usefixtures("_fresh_loader")
def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "__path__", [])
    assert not cpu.is_available()
    with pytest.raises(UnsupportedError, match=r'install a C\+\+ compiler.*reinstall homkv, or pass impl="reference"'):
        cpu.require()
    with pytest.raises(UnsupportedError, match="not built"):
        api.attend(torch.ones(2, 4, 1, 64), view_of(), CODEC, 1.0)
    o, _ = api.attend(torch.ones(2, 4, 1, 64), view_of(), CODEC, 1.0, impl="reference")
    assert bool(torch.isfinite(o).all())


@pytest.mark.usefixtures("_fresh_loader")
def test_a_library_that_does_not_load_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / binding.LIBRARY_NAMES[0]).write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "__path__", [str(tmp_path)])
    with pytest.raises(UnsupportedError, match="does not load"):
        cpu.require()


@needs_kernel
@pytest.mark.usefixtures("_fresh_loader")
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "ABI", binding.ABI + 1)
    with pytest.raises(UnsupportedError, match="reinstall homkv to rebuild"):
        cpu.require()
