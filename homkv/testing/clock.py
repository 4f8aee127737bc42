"""A process whose clock jumps when another process says so.

``python -m homkv.testing.clock FILE MODULE ARG…`` runs a module whose ``time.monotonic`` is the system's plus the
seconds that FILE holds, read at every call. Leases, timeouts and statistics of that process all see the jump, as those
of a machine that was suspended do; timers inside C libraries do not.
"""

import mmap
import runpy
import struct
import sys
import time
from pathlib import Path

_SECONDS = struct.Struct("d")  # 8 bytes in one piece: never half written


class ClockFile:
    """Seconds that the clocks of the processes of :meth:`command` are ahead; ``path`` is made if need be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(_SECONDS.pack(0.0))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SECONDS.size)

    @property
    def ahead_s(self) -> float:
        """By how much."""
        return float(_SECONDS.unpack_from(self._map)[0])

    def jump(self, seconds: float) -> None:
        """Forward, at once."""
        _SECONDS.pack_into(self._map, 0, self.ahead_s + seconds)

    def command(self, module: str) -> list[str]:
        """Arguments of the interpreter that run ``module`` on this clock."""
        return ["-m", "homkv.testing.clock", str(self.path), module]

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._map.close()


def main() -> None:
    """Set the clock, then be the other module."""
    clock, real = ClockFile(Path(sys.argv[1])), time.monotonic
    time.monotonic = lambda: real() + clock.ahead_s
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
