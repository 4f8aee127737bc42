"""Instances as `homkv serve` starts them: processes with keys, which signals stop and kill."""

import signal
import tempfile
from pathlib import Path

from homkv.errors import TransferError
from homkv.eval.chaos.service import KV_CACHE_DTYPE, MAX_TOKENS, Cell, Subject
from homkv.serve.query import Policy
from homkv.serve.spawn import COMMAND, InstanceOptions, LocalCluster
from homkv.testing.clock import ClockFile
from homkv.testing.faults import Where

NAMES: dict[Where, str] = {"prefill": "prefill-0", "decode": "decode-0"}
START_S = 20.0  # most of it is spent on importing torch
DRAIN_S = 0.1  # asked to stop, an instance lets go of what runs: it must tell whose it was


class ProcessCell(Cell):
    """Faults of processes are signals to them. The dispatcher and the faulty links are here."""

    def __init__(self, subject: Subject, policy: Policy = "fail") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="homkv-chaos-")
        self._clock = ClockFile(Path(self._folder.name) / "ahead")
        options = InstanceOptions(
            subject.source,
            (KV_CACHE_DTYPE,),
            link_gbps=subject.link_gbps,
            num_threads=1,
            max_tokens=MAX_TOKENS,
            prefill={"prefix_bytes": 0, "chunk_tokens": 128, "drain_s": DRAIN_S},
            decode={"lease_s": subject.lease_s, "max_lease_s": subject.request_timeout_s, "drain_s": DRAIN_S},
            entry={"decode": self._clock.command(COMMAND)},
        )
        self.cluster = LocalCluster(options)
        self.cluster.__enter__()
        reached = {where: self.cluster.addresses(where)[0] for where in NAMES}
        super().__init__(subject, reached, self.cluster.security, policy, START_S)

    def _signal(self, where: Where, number: signal.Signals) -> None:
        self.cluster.processes[NAMES[where]].send_signal(number)

    def check(self) -> None:
        """See Cell.check: both processes live. Stored bytes are checked by the instance when it shares them."""
        for name in NAMES.values():
            code = self.cluster.processes[name].poll()
            if code is not None:
                log = self.cluster.log(name)
                raise TransferError(f"expected {name} to live, found it ended with code {code}; its log:\n{log}")

    def kill(self, where: Where) -> None:
        """SIGKILL."""
        self._signal(where, signal.SIGKILL)

    def terminate(self, where: Where) -> None:
        """SIGTERM."""
        self._signal(where, signal.SIGTERM)

    def revive(self, where: Where) -> None:
        """See Cell.revive: at the same address, with the same keys."""
        self.cluster.revive(NAMES[where])

    def pause(self, where: Where) -> None:
        """SIGSTOP."""
        self._signal(where, signal.SIGSTOP)

    def resume(self, where: Where) -> None:
        """SIGCONT."""
        self._signal(where, signal.SIGCONT)

    def jump(self, seconds: float) -> None:
        """See Cell.jump: every clock of the process that Python reads."""
        self._clock.jump(seconds)

    def close(self) -> None:
        """End everything."""
        super().close()
        self.cluster.close()
        self._clock.close()
        self._folder.cleanup()
