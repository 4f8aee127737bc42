"""Fair sharing: the definition of max-min fairness, and processor sharing in closed form."""

import random
from typing import Any

import pytest
import simpy

from homkv.sim.job import Job
from homkv.sim.link import Network, Transfer, overlapped_start, share
from homkv.sim.trace import Request


def job(prefill_id: int, decode_id: int, size: int) -> Job:
    out = Job(Request("x", 0.0, 1, 1), size, 0)
    out.prefill_id, out.decode_id = prefill_id, decode_id
    return out


@pytest.mark.parametrize("seed", range(20))
def test_rates_are_max_min_fair(seed: int) -> None:
    """No interface is over its limit, and every transfer has a full one on which nobody gets more than it does."""
    rng = random.Random(seed)
    pairs = {(rng.randrange(4), rng.randrange(3)) for _ in range(rng.randint(1, 12))}
    egress, ingress = rng.uniform(1, 10), rng.uniform(1, 10)
    transfers = [Transfer(pair, job(*pair, 1)) for pair in sorted(pairs)]
    share(transfers, egress, ingress)
    for transfer in transfers:
        bottlenecked = []
        for side, limit in ((0, egress), (1, ingress)):
            others = [t.rate for t in transfers if t.pair[side] == transfer.pair[side]]
            assert sum(others) <= limit * (1 + 1e-9)
            bottlenecked.append(sum(others) >= limit * (1 - 1e-9) and transfer.rate >= max(others) * (1 - 1e-9))
        assert any(bottlenecked)


def ends(jobs: list[tuple[float, Job]], egress: float, ingress: float) -> list[float]:
    env = simpy.Environment()
    got: dict[int, float] = {}
    network = Network(env, egress, ingress, lambda done: got.update({id(done): env.now}))

    def feed() -> Any:
        for at, item in jobs:
            yield env.timeout(at - env.now)
            network.put(item)

    env.process(feed())
    env.run()
    assert network.sent_bytes == network.received_bytes == sum(item.wire_bytes for _, item in jobs)
    return [got[id(item)] for _, item in jobs]


def test_two_senders_share_one_receiver() -> None:
    # 100 bytes alone for 5 s at 10/s, then both at 5/s: the first has 50 left and ends at 15, the second ends at 20.
    assert ends([(0.0, job(0, 0, 100)), (5.0, job(1, 0, 100))], 10, 10) == pytest.approx([15.0, 20.0])


def test_one_connection_keeps_the_order() -> None:
    assert ends([(0.0, job(0, 0, 100)), (0.0, job(0, 0, 10))], 10, 10) == pytest.approx([10.0, 11.0])


def test_a_sender_serves_two_receivers_at_once() -> None:
    assert ends([(0.0, job(0, 0, 100)), (0.0, job(0, 1, 10))], 10, 10) == pytest.approx([11.0, 2.0])


def test_a_slow_sender_leaves_the_rest_to_others() -> None:
    # Three senders of at most 4 bytes/s into 10: 10/3 each; two would be limited by themselves.
    assert ends([(0.0, job(i, 0, 40)) for i in range(3)], 4, 10) == pytest.approx([12.0] * 3)
    assert ends([(0.0, job(i, 0, 40)) for i in range(2)], 4, 10) == pytest.approx([10.0] * 2)


def test_overlapped_start_never_starves() -> None:
    for rate in (1.0, 10.0, 1000.0, float("inf")):
        start = overlapped_start(0.0, 8.0, 4, 100, rate)
        assert start >= 8.0 / 4
        end = start + 100 / rate
        layer_by_layer = max(2.0 + 100 / rate, 8.0 + 25 / rate)  # the link or the producer sets the pace
        assert end == pytest.approx(layer_by_layer)
