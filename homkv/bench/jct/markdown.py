"""One table for a page: what was measured, ratios to both baselines, what a simulation of the same requests says."""

from collections.abc import Iterator, Sequence

from homkv.bench.jct.summary import BASELINES, Summary, baseline_of
from homkv.sim.record import Run
from homkv.sim.validate import CostsOf, compared

COLUMNS = (
    "case", "KV", "MB sent", "JCT mean", "P99", "TTFT", "TPOT ms", "on the link", "peak KV GiB", "req/s", "x 16 bits",
    "x fp8", "simulated",
)  # fmt: skip


def markdown(summaries: Sequence[Summary], record: Sequence[Run], costs_of: CostsOf | None) -> Iterator[str]:
    """Lines of a table, case by case. ``costs_of``: step times to simulate with (homkv.sim.validate); None: do not.

    ``record``: all runs beside these, of which simulations may need the shared machine's factors.
    """
    yield row_of(COLUMNS)
    yield "|---" * len(COLUMNS) + "|"
    for case in dict.fromkeys(s.case for s in summaries):
        members = [s for s in summaries if s.case == case]
        for index, s in enumerate(members):
            said = predicted(s, record, costs_of) if costs_of is not None else ""
            yield row_of([case if index == 0 else "", s.name, *numbers(s), *ratios(s, members), said])


def row_of(cells: Sequence[str]) -> str:
    """Cells between bars."""
    return "| " + " | ".join(cells) + " |"


def numbers(s: Summary) -> list[str]:
    """Bytes and times."""
    sent_mb, held_gib = s.mean("wire_bytes") / 1e6, s.peak_kv_bytes / 2**30
    return [
        f"{sent_mb:.0f}" if sent_mb > 100 else f"{sent_mb:.1f}",
        f"{s.mean('jct_s'):.2f}",
        f"{s.percentile('jct_s', 99):.2f}",
        f"{s.mean('ttft_s'):.2f}",
        f"{s.mean('tpot_s') * 1e3:.1f}",
        f"{s.mean('transfer_s'):.2f}",
        f"{held_gib:.1f}" if held_gib > 1 else f"{held_gib:.3f}",
        f"{s.throughput_rps:.2f}",
    ]


def ratios(s: Summary, members: Sequence[Summary]) -> list[str]:
    """Mean job completion time relative to 16 bits and to fp8 in the same case."""
    sixteen = next((b for name in BASELINES[:-1] if (b := baseline_of(s, members, name))), None)
    pairs = (sixteen, baseline_of(s, members, BASELINES[-1]))
    return ["" if b is None else f"{s.mean('jct_s') / b.mean('jct_s'):.2f}" for b in pairs]


def predicted(s: Summary, record: Sequence[Run], costs_of: CostsOf) -> str:
    """Simulated mean job completion time, and how far it is off."""
    found = compared(s.name, s.runs, costs_of, record)
    return f"{found.simulated_jct_s:.2f} ({100 * found.mean_error:+.1f} %)"
