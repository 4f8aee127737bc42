"""Real instances that end by themselves: they come back as somebody else, and requests end right whatever they did."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_cases import Asked, wait_until

from homkv.serve.dispatch import Dispatcher
from homkv.serve.fleet import Role
from homkv.serve.messages import Progress
from homkv.serve.query import DispatchOptions, Query
from homkv.serve.spawn import InstanceOptions, LocalCluster
from homkv.serve.supervise import Supervisor
from homkv.testing.models import random_ids, save_tiny_model

START_S = 300.0  # of a process on a busy machine
QUERY = Query(random_ids(300, seed=60), "balanced", 12, return_evidence=True, report_progress=True)
NAMES: dict[Role, str] = {"prefill": "prefill-0", "decode": "decode-0"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder: Path = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    # Without kept prefixes, which are rounded to 16 bits: a second attempt must compute what the first one did.
    options = InstanceOptions(
        str(folder), ("balanced",), link_gbps=0.004, num_threads=1, max_tokens=2048, prefill={"prefix_bytes": 0}
    )
    with LocalCluster(options) as made, Supervisor(made):
        yield made


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_instance_that_aborts_in_mid_transfer_is_started_again(cluster: LocalCluster, role: Role) -> None:
    """SIGABRT is what a failed assertion of a library ends with. The request is computed again, to the same answer."""
    limits = DispatchOptions("recompute", request_timeout_s=2 * START_S, no_instance_timeout_s=START_S)
    prefills, decodes = cluster.addresses("prefill"), cluster.addresses("decode")
    with Dispatcher(prefills, decodes, cluster.security, limits=limits) as dispatcher:
        clean = Asked(dispatcher, QUERY, patience_s=START_S)
        assert clean.end().error is None
        process = cluster.processes[NAMES[role]]
        (harmed,) = (member for member in dispatcher.members if member.role == role)
        before = harmed.status
        asked = Asked(dispatcher, QUERY, patience_s=START_S)
        asked.until(Progress)
        process.send_signal(signal.SIGABRT)
        ended = asked.end()
        assert ended.error is None
        assert ended.record.num_attempts > 1
        assert asked.answer == clean.answer
        assert process.wait(1) == -signal.SIGABRT
        assert cluster.processes[NAMES[role]].pid != process.pid
        wait_until(lambda: harmed.status is not None and harmed.status is not before)
        assert before is not None
        assert harmed.status is not None
        assert harmed.status.incarnation != before.incarnation
        assert harmed.num_restarts == 1
        assert [a.endpoint for a in cluster.addresses(role)] == [harmed.address.endpoint]


def test_an_instance_that_keeps_dying_keeps_coming_back(cluster: LocalCluster) -> None:
    for _ in range(2):
        process = cluster.processes["decode-0"]
        process.kill()
        wait_until(lambda old=process: cluster.processes["decode-0"] is not old, START_S)  # type: ignore[misc]
    limits = DispatchOptions(no_instance_timeout_s=START_S)
    with Dispatcher(
        cluster.addresses("prefill"), cluster.addresses("decode"), cluster.security, limits=limits
    ) as dispatcher:
        assert Asked(dispatcher, QUERY, patience_s=START_S).end().error is None
