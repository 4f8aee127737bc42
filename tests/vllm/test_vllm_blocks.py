"""Arithmetic and names of vLLM's blocks: no vLLM needed."""

import pytest

from homkv.errors import FormatError, UnsupportedError
from homkv.spec import ALL_PRESETS, HEAD_DIMS, PAGE_TOKENS, RowsSpec
from homkv.vllm.blocks import TAG_BYTES, BlockPlan, preset_names

LONG = 32_768  # tokens


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("raw_bytes", [2, 4])
def test_both_kinds_of_blocks_fit_and_one_page_less_would_not(preset: str, head_dim: int, raw_bytes: int) -> None:
    spec = RowsSpec.parse(preset)
    plan = BlockPlan.of(spec, head_dim, raw_bytes)
    exact = PAGE_TOKENS * 2 * head_dim * raw_bytes + TAG_BYTES
    page_bytes = spec.layout(head_dim).page_bytes
    assert plan.block_bytes(head_dim) == plan.pages_per_block * page_bytes
    assert plan.block_bytes(head_dim) - page_bytes < exact <= plan.block_bytes(head_dim)


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_equal_blocks_waste_less_than_three_percent_at_32k(preset: str, head_dim: int) -> None:
    plan = BlockPlan.of(RowsSpec.parse(preset), head_dim)
    worst = max(plan.unused_bytes(n, head_dim) / plan.kv_bytes(n, head_dim) for n in range(LONG, LONG + 512))
    assert worst < 0.03


@pytest.mark.parametrize(("preset", "exact_blocks"), [("balanced", 3), ("balanced-long", 5)])
def test_balanced_takes_less_than_a_sixth_of_16_bit_at_32k(preset: str, exact_blocks: int) -> None:
    plan = BlockPlan.of(RowsSpec.parse(preset), 128)
    assert plan.block_size == 448
    assert plan.num_blocks(LONG) == 74 + exact_blocks
    assert plan.kv_bytes(LONG, 128) * 6 < LONG * 2 * 128 * 2


@pytest.mark.parametrize("window", [64, 128, 192, 256])
def test_exact_blocks_hold_first_tokens_window_and_a_page_that_fills(window: int) -> None:
    plan = BlockPlan.of(RowsSpec.parse(f"k4420v2222w{window}"), 128)
    assert plan.exact_blocks * PAGE_TOKENS == PAGE_TOKENS + window + PAGE_TOKENS


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 2), (64, 2), (65, 3), (128, 3), (129, 4), (448, 4), (449, 5)])
def test_short_sequences_take_no_more_exact_blocks_than_they_fill(tokens: int, blocks: int) -> None:
    assert BlockPlan.of(RowsSpec.parse("balanced"), 64).num_blocks(tokens) == blocks


def test_unused_bytes_are_counted_one_by_one() -> None:
    plan = BlockPlan.of(RowsSpec.parse("balanced"), 64)
    page, exact = 2624, 64 * 256 + TAG_BYTES
    # 1,000 tokens: 3 blocks of 7 pages hold pages 1 to 15, the last one open; page 0's place and 5 more stay empty.
    assert plan.unused_bytes(1000, 64) == 6 * page + 3 * (7 * page - exact)


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("balanced", "HOMKV_K4420V2222_P1_L1_B448"),
        ("small-long", "HOMKV_K4220V2222W192_P1_L1_B512"),
    ],
)
def test_a_name_says_everything_and_is_read_back(preset: str, name: str) -> None:
    plan = BlockPlan.of(RowsSpec.parse(preset), 128)
    assert plan.name == name
    assert BlockPlan.parse(plan.name) == plan
    assert plan.name in set(preset_names())


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "FLASH_ATTN",
            "HOMKV_K4420V2222_P1_L1_B448 ",
            "HOMKV_K4420V2222_P2_L1_B448",
            "HOMKV_K4420V2222_P1_L2_B448",
            "HOMKV_K4420V2222W64_P1_L1_B448",
            "HOMKV_K4420V2222W100_P1_L1_B448",
        ),
        *("HOMKV_K4420V2222_P1_L1_B100", "HOMKV_K4420V2222_P1_L1_B0", "HOMKV_K4430V2222_P1_L1_B448"),
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="expected a backend HOMKV_"):
        BlockPlan.parse(name)


@pytest.mark.parametrize(("head_dim", "raw_bytes", "block_size"), [(128, 4, 448), (128, 2, 64), (80, 4, 448)])
def test_a_plan_for_another_model_is_refused_with_the_right_name(
    head_dim: int, raw_bytes: int, block_size: int
) -> None:
    plan = BlockPlan.of(RowsSpec.parse("balanced"), 128)
    needed = BlockPlan.of(RowsSpec.parse("balanced"), head_dim, raw_bytes)
    with pytest.raises(UnsupportedError, match=needed.name):
        plan.check(head_dim, raw_bytes, block_size)


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("raw_bytes", [2, 4])
def test_a_plan_names_every_head_dim_that_it_is_for(preset: str, head_dim: int, raw_bytes: int) -> None:
    assert head_dim in BlockPlan.of(RowsSpec.parse(preset), head_dim, raw_bytes).head_dims()


def test_a_plan_names_no_other_head_dim() -> None:
    assert BlockPlan(RowsSpec.parse("balanced"), 64).head_dims() == []


def test_a_plan_for_the_model_is_accepted() -> None:
    BlockPlan.of(RowsSpec.parse("balanced"), 128).check(128, 2, 448)
