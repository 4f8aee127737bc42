"""Names, classes and offsets of pages; the table in docs/format.md is arithmetic that must hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homkv.errors import FormatError, UnsupportedError
from homkv.spec import (
    ALL_PRESETS,
    DIGITS,
    HEAD_DIMS,
    LONG_PRESETS,
    PAGE_ALIGN,
    PAGE_TOKENS,
    RowsSpec,
    class_widths,
)

digits = st.tuples(*[st.sampled_from(DIGITS)] * 4)


def test_balanced_page_is_the_one_in_the_docs() -> None:
    layout = RowsSpec.parse("balanced").layout(128)
    assert [(c.start, c.width, c.bits, c.codes_offset, c.scales_offset) for c in layout.k_classes] == [
        (0, 64, 4, 0, 2560),
        (64, 32, 2, 2048, 2624),
    ]
    assert [(c.start, c.width, c.bits, c.codes_offset, c.scales_offset) for c in layout.v_classes] == [
        (0, 128, 2, 2688, 4736)
    ]
    assert (layout.centre_offset, layout.used_bytes, layout.page_bytes) == (4800, 5056, 5056)


@pytest.mark.parametrize(
    ("preset", "bytes_per_token"), [("small", 71), ("balanced", 79), ("quality", 106), ("near-lossless", 152)]
)
def test_presets_cost_what_the_design_says(preset: str, bytes_per_token: int) -> None:
    assert RowsSpec.parse(preset).layout(128).used_bytes / PAGE_TOKENS == pytest.approx(bytes_per_token, abs=1)


@pytest.mark.parametrize("name", LONG_PRESETS)
def test_long_presets_are_the_pages_of_others_behind_another_window(name: str) -> None:
    long, short = RowsSpec.parse(name), RowsSpec.parse(name.removesuffix("-long"))
    assert long.layout(128) == short.layout(128)
    assert long.min_window > short.min_window


@pytest.mark.parametrize("name", [*ALL_PRESETS, *ALL_PRESETS.values(), "k0000v0000", "k8888v2220"])
def test_names_round_trip(name: str) -> None:
    spec = RowsSpec.parse(name)
    assert spec.name == ALL_PRESETS.get(name, name)
    assert RowsSpec.parse(spec.name) == spec


@pytest.mark.parametrize("name", ["", "k4420", "k4420v222", "k4420v22222", "k4320v2222", "K4420V2222", "k4420v2222 "])
def test_bad_names_are_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(FormatError, match="homkv formats"):
        RowsSpec.parse(name)


def test_bad_digits_are_refused() -> None:
    with pytest.raises(FormatError, match="four digits"):
        RowsSpec((4, 4, 3, 0), (2, 2, 2, 2))


def test_other_head_dims_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="fp16"):
        RowsSpec.parse("balanced").layout(100)


def test_a_run_of_three_quarters_is_two_classes() -> None:
    assert class_widths((4, 4, 4, 2), 32) == [(0, 64, 4), (64, 32, 4), (96, 32, 2)]
    assert class_widths((0, 2, 0, 2), 32) == [(32, 32, 2), (96, 32, 2)]


@given(bits=digits)
def test_classes_cover_exactly_the_quarters_with_bits(bits: tuple[int, ...]) -> None:
    covered = {}
    for start, width, b in class_widths(bits, 16):
        assert width & (width - 1) == 0
        for slot in range(start, start + width):
            assert slot not in covered
            covered[slot] = b
    assert covered == {slot: bits[slot // 16] for slot in range(64) if bits[slot // 16]}


@given(k_bits=digits, v_bits=digits, head_dim=st.sampled_from(HEAD_DIMS))
def test_sections_tile_the_page(k_bits: tuple[int, ...], v_bits: tuple[int, ...], head_dim: int) -> None:
    layout = RowsSpec(k_bits, v_bits).layout(head_dim)  # type: ignore[arg-type]
    sections = [(layout.centre_offset, 2 * head_dim)]
    for c in (*layout.k_classes, *layout.v_classes):
        assert c.width % c.hadamard_block == 0
        assert c.planes * c.lanes == PAGE_TOKENS
        sections += [(c.codes_offset, c.code_bytes), (c.scales_offset, PAGE_TOKENS)]
    end = 0
    for offset, size in sorted(sections):
        assert offset == end
        end = offset + size
    assert end == layout.used_bytes
    assert layout.page_bytes % PAGE_ALIGN == 0
    assert 0 <= layout.page_bytes - layout.used_bytes < PAGE_ALIGN
