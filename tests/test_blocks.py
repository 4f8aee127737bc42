"""Reference-counted blocks: nothing is handed out twice, nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homkv.blocks import BlockPool
from homkv.errors import CapacityError, HomkvError


def test_blocks_come_back_with_their_last_reference() -> None:
    pool = BlockPool(3)
    a, b = pool.allocate(2)
    assert a != b
    pool.share([a])
    pool.release([a, b])
    assert pool.num_free == 2
    pool.check([[a]])
    pool.release([a])
    assert pool.num_free == 3
    pool.check([])


def test_too_many_blocks_are_refused_and_none_taken() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(CapacityError, match="expected 3 free page blocks, found 2 of 3"):
        pool.allocate(3)
    assert pool.num_free == 2
    with pytest.raises(CapacityError):
        BlockPool(-1)


def test_free_blocks_can_be_neither_shared_nor_released() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(HomkvError, match="released twice"):
        pool.release([block])
    with pytest.raises(HomkvError, match="live sequences"):
        pool.share([block])
    pool.check([])


@pytest.mark.parametrize("holders", [[], [[0, 0]], [[1]], [[0], [0]]])
def test_wrong_books_are_noticed(holders: list[list[int]]) -> None:
    pool = BlockPool(2)
    assert pool.allocate(1) == [0]
    with pytest.raises(HomkvError, match="bug"):
        pool.check(holders)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 6)), max_size=40))
def test_any_history_keeps_the_books(history: list[tuple[str, int]]) -> None:
    pool, holders = BlockPool(8), []
    for action, n in history:
        if action == "allocate" and n <= pool.num_free:
            holders.append(pool.allocate(n))
        elif action == "share" and holders:
            holders.append(list(holders[n % len(holders)]))
            pool.share(holders[-1])
        elif action == "release" and holders:
            pool.release(holders.pop(n % len(holders)))
        pool.check(holders)
        assert pool.num_free == 8 - len({block for blocks in holders for block in blocks})
