"""How many cores there are for us."""

import os


def num_cores() -> int:
    """Cores that this process and its children may use: fewer than the machine's where they are bound to some."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
