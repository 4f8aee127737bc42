"""Children that end by themselves are started again."""

import threading
import time

from homkv.errors import TransferError
from homkv.serve.logs import get_logger
from homkv.serve.spawn import LocalCluster

log = get_logger(__name__)
LOOK_EVERY_S = 0.5
FIRST_WAIT_S, LAST_WAIT_S = 0.5, 30.0
SOUND_S = 60.0  # a child that has lived so long starts over with the shortest wait


class Supervisor:
    """Watches a cluster in a thread; a child that keeps dying is started less and less often. A context manager."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._waits_s: dict[str, float] = {}
        self._began_s = dict.fromkeys(cluster.processes, time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervise", daemon=True)

    def __enter__(self) -> "Supervisor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Start nothing any more. The cluster is closed next, which ends a start that is under way."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            for name, process in list(self._cluster.processes.items()):
                if process.poll() is not None and not self._stop.is_set():
                    self._revive(name)

    def _revive(self, name: str) -> None:
        now_s = time.monotonic()
        was_sound = now_s - self._began_s[name] > SOUND_S
        wait_s = FIRST_WAIT_S if was_sound else self._waits_s.get(name, FIRST_WAIT_S)
        self._waits_s[name] = min(2 * wait_s, LAST_WAIT_S)
        if self._stop.wait(wait_s):
            return
        log.warning("restarts an instance", instance=name)
        self._began_s[name] = time.monotonic()
        try:
            self._cluster.revive(name)
        except TransferError as error:
            log.error("instance does not start", instance=name, error=str(error))
