import pytest
from hypothesis import given
from hypothesis import strategies as st
from transport_cases import no_deadline

from homkv.errors import ShapeError
from homkv.transport.lease import Lease
from homkv.transport.shaper import LinkShaper

sizes = st.lists(st.integers(0, 64 << 20), min_size=1, max_size=50)


@no_deadline
@given(sizes, st.sampled_from([1.0, 10.0, 25.0, 100.0]))
def test_queued_frames_take_their_bits_over_the_rate(frames: list[int], gbps: float) -> None:
    shaper = LinkShaper(gbps)
    last = max(shaper.reserve(n, 3.0) for n in frames)
    assert last - 3.0 == pytest.approx(sum(frames) * 8 / (gbps * 1e9), rel=1e-6, abs=1e-9)
    assert shaper.sent_bytes == sum(frames)
    assert shaper.busy_s == pytest.approx(last - 3.0, rel=1e-6, abs=1e-9)


@no_deadline
@given(st.lists(st.tuples(st.integers(1, 8 << 20), st.floats(0, 0.2)), min_size=1, max_size=50))
def test_no_frame_crosses_faster_than_the_link_and_idle_time_is_not_saved_up(frames: list[tuple[int, float]]) -> None:
    shaper, now, free = LinkShaper(1.0), 0.0, 0.0
    for num_bytes, gap in frames:
        now += gap
        due = shaper.reserve(num_bytes, now)
        assert due == pytest.approx(max(free, now) + num_bytes * 8e-9)
        free = due


def test_unshaped_counts_and_never_delays() -> None:
    shaper = LinkShaper()
    assert [shaper.reserve(1 << 30, t) for t in (1.0, 1.5)] == [1.0, 1.5]
    assert (shaper.sent_bytes, shaper.busy_s) == (2 << 30, 0.0)


@pytest.mark.parametrize("gbps", [0, -1, float("nan")])
def test_a_rate_must_be_positive(gbps: float) -> None:
    with pytest.raises(ShapeError, match="positive rate"):
        LinkShaper(gbps)


def test_a_lease_expires_at_its_absolute_time_unless_renewed() -> None:
    now = 100.0
    lease = Lease(30.0, clock=lambda: now)
    assert (lease.expires_at_s, lease.expired) == (130.0, False)
    now = 129.0
    assert lease.remaining_s == 1.0
    lease.renew()
    now = 158.0
    assert not lease.expired
    now = 159.0
    assert lease.expired
    assert lease.remaining_s == 0.0
