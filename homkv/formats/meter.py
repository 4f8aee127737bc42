"""A clock for what attention on a format costs beside its two products: restoring pages, or correcting products."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Seconds that this process has spent inside :meth:`running`, which is not to be nested."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what the block takes, on the host: work that a GPU only queues is not seen."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start_s


OVERHEAD = Meter()  # of the readable implementation; kernels interleave such work with the products
