"""Tables of simulations, for the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from homkv.sim.claims import RIVALS, GridRow, PartRow
from homkv.sim.hardware import data
from homkv.sim.paper import ArtifactRow, PaperRow, reductions
from homkv.sim.record import PHASES
from homkv.sim.summary import Summary
from homkv.sim.validate import MAX_MEAN_ERROR, MAX_P99_ERROR, Validation
from homkv.sim.whatif import Advice, Option, Options

CLAIMED = {
    "cocktail": (("cocktail", ("cocktail",)), ("long", ("long",))),
    "all four": (("all four", ("imdb", "humaneval", "arxiv", "cocktail")), ("long", ("long",))),
}
LEAST_SHOWN_S = 0.005


def _table(title: str, left: Sequence[str], right: Sequence[str], caption: str | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        padding=(0, 0),  # one space between columns: most tables fit in 80
    )
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", min_width=4, overflow="fold")  # a number cut off is another number
    return table


def summary_table(rows: Mapping[str, Summary], title: str) -> Table:
    """Decomposition of mean JCT per format; phases that nothing spends time in are left out."""
    phases = [phase for phase in PHASES if any(s.phases_s[phase] >= LEAST_SHOWN_S for s in rows.values())]
    headings = ["JCT s", "P99 s", "TTFT s", "TPOT ms", *(phase.removesuffix("_s") for phase in phases)]
    table = _table(title, ["format"], [*headings, "deq. or correct", "MB/ request", "peak KV GB"])
    for name, s in rows.items():
        times = [f"{s.jct_s:.2f}", f"{s.jct_p99_s:.2f}", f"{s.ttft_s:.2f}", f"{1e3 * s.tpot_s:.1f}"]
        shares = [f"{seconds:.2f}" for seconds in (*(s.phases_s[phase] for phase in phases), s.dequantize_s)]
        table.add_row(name, *times, *shares, f"{s.wire_bytes / 1e6:.1f}", f"{s.peak_kv_bytes / 1e9:.1f}")
    return table


def paper_tables(rows: Sequence[PaperRow]) -> list[Table]:
    """One table per prefill GPU: our JCT and its reduction against each rival in the same conditions."""
    rivals = [key for key in dict.fromkeys((r.format, r.overlap) for r in rows) if key[0] not in ("balanced", "small")]
    out = []
    for gpu in dict.fromkeys(r.prefill_gpu for r in rows):
        names = [name + (" +overlap" if overlap else "") for name, overlap in rivals]
        table = _table(
            f"{rows[0].model}, {gpu} prefill, A100 decode: mean JCT of balanced, and how much lower it is than with",
            ["profile", "load", "N", "limit"],
            ["JCT s", *names],
            "load: of what the 16-bit system can serve; limit: its bottleneck; N: prefill instances",
        )
        members = [r for r in rows if r.prefill_gpu == gpu]
        for profile, load in dict.fromkeys((r.profile, r.load) for r in members):
            runs = {(r.format, r.overlap): r for r in members if (r.profile, r.load) == (profile, load)}
            ours = runs["balanced", True]
            cells = [f"{1 - ours.summary.jct_s / runs[key].summary.jct_s:.0%}" for key in rivals]
            place = [profile, f"{load:g}", str(ours.num_prefill), ours.bottleneck]
            table.add_row(*place, f"{ours.summary.jct_s:.2f}", *cells)
        out.append(table)
    return out


def claims_table(rows: Sequence[PaperRow]) -> Table:
    """What the paper claims for HACK, and what the simulation finds for HACK and for balanced."""
    loads = sorted({row.load for row in rows})
    headings = ["paper", *(f"{name} {load:g}" for name in ("hack", "balanced") for load in loads)]
    caption = (
        "reduction of mean JCT at each load; all four: the range over the paper's data sets. "
        "long: cocktail's prompts with answers of 256 to 512 tokens instead of at most 12"
    )
    table = _table("The paper's claims for HACK", ["prefill", "data", "against"], headings, caption)
    for claim in data("claims.json")["paper"]:
        for shown, profiles in CLAIMED[claim["profile"]]:
            cells = [_range(*claim["reduction"])]
            for ours in (("hack", False), ("balanced", True)):
                found = reductions(rows, ours, (claim["against"], False))
                for load in loads:
                    places = [(claim["prefill_gpu"], profile, load) for profile in profiles]
                    values = [found[place] for place in places if place in found]
                    cells.append(_range(min(values), max(values)) if values else "")
            table.add_row(claim["prefill_gpu"], shown, claim["against"], *cells)
    return table


def _range(low: float, high: float) -> str:
    return f"{low:.0%}" if high - low < 0.005 else f"{low:.0%} to {high:.0%}"


def grid_table(rows: Sequence[GridRow]) -> Table:
    """Every prefill GPU and data set: HACK's reduction, simulated and published, and what a 16-bit JCT consists of."""
    load = rows[0].place[2] if rows else 0
    phases = ("queue_s", "prefill_s", "transfer_s", "wait_s", "decode_s")
    headings = [f"{name} {which}" for name in RIVALS for which in ("paper", "sim.")]
    table = _table(
        f"Reduction of mean JCT by HACK, against; load {load:g} of what 16 bits can serve",
        ["prefill", "data", "limit"],
        [*headings, *(phase.removesuffix("_s") for phase in phases)],
        "right: shares of a 16-bit JCT, hence what can be saved; empty: not seen in the paper or its summaries",
    )
    for row in rows:
        cells = []
        for name in RIVALS:
            seen = row.published[name]
            cells += ["" if seen is None else _range(*seen), f"{row.simulated[name]:.0%}"]
        table.add_row(*row.place[:2], row.limit, *cells, *(f"{row.shares[phase]:.0%}" for phase in phases))
    return table


def parts_table(rows: Sequence[PartRow]) -> Table:
    """What the paper says of parts of the time, beside the range simulated at each load, and why it differs."""
    loads = sorted({load for row in rows for load in row.simulated})
    table = _table("The paper's other numbers", ["quantity"], ["paper", *(f"{load:g}" for load in loads)])
    table.add_column("where and why they differ", overflow="fold", min_width=30)
    for row in rows:
        cells = [_range(*row.simulated[load]) if load in row.simulated else "" for load in loads]
        table.add_row(row.what, _range(*row.published), *cells, row.why)
    return table


def ablation_table(rows: Sequence[PaperRow]) -> Table:
    """HACK's eliminations and partitions, and our kernel's integer products against restoring the same pages."""
    base = rows[0]
    title = f"Ablations: {base.prefill_gpu} prefill, {base.profile}, load {base.load:g}"
    table = _table(title, ["format"], ["JCT s", "against hack", "decode s", "deq. or correct s"])
    for row in rows:
        s, name = row.summary, row.name
        change = f"{s.jct_s / base.summary.jct_s - 1:+.1%}"
        table.add_row(name, f"{s.jct_s:.2f}", change, f"{s.phases_s['decode_s']:.2f}", f"{s.dequantize_s:.2f}")
    return table


def artifact_table(rows: Sequence[ArtifactRow]) -> Table:
    """Published measurements beside simulations."""
    headings = [
        f"{name} {which}" for name in ("JCT s", "TTFT s", "TPOT ms", "transfer s") for which in ("pub.", "sim.")
    ]
    table = _table("The authors' runs on two GPUs, published and simulated", ["GPU", "req/s", "format"], headings)
    for row in rows:
        claim, s = row.claim, row.simulated
        cells = []
        for published, own in (
            (claim["jct_s"], s.jct_s),
            (claim["ttft_s"], s.ttft_s),
            (claim["tpot_ms"], 1e3 * s.tpot_s),
            (claim["transfer_s"], s.phases_s["transfer_s"]),
        ):
            cells += [f"{published:.2f}", f"{own:.2f}"]
        table.add_row(claim["gpu"], f"{claim['rate']:.2f}", claim["format"], *cells)
    return table


def option_table(options: Sequence[Option], best: Option, title: str) -> Table:
    """Sized deployments, the recommended one in green."""
    headings = ["prefill", "decode", "GPUs", "cost/M tokens", "JCT s", "P99 s", "TTFT s", "TPOT ms", "transfer s"]
    table = _table(
        title, ["format"], [*headings, "limit"], "instances for the mean load at --utilisation of every stage"
    )
    for o in options:
        s = o.summary
        times = [f"{s.jct_s:.2f}", f"{s.jct_p99_s:.2f}", f"{s.ttft_s:.2f}", f"{1e3 * s.tpot_s:.1f}"]
        size = [str(o.num_prefill), str(o.num_decode), str(o.gpus), f"{o.cost:.2f}"]
        style = "green" if o is best else ""
        table.add_row(o.format, *size, *times, f"{s.phases_s['transfer_s']:.2f}", o.bottleneck, style=style)
    return table


def print_advice(console: Console, options: Options, advice: Advice, title: str) -> None:
    """The table of options, what to take and why."""
    best = advice.best
    console.print(option_table(options.found, best, title))
    for name, reason in options.impossible.items():
        console.print(f"{name} cannot serve this: {reason}", highlight=False)
    console.print(f"[bold]{best.format}[/bold], {best.num_prefill} prefill and {best.num_decode} decode instances")
    console.print(advice.reason, highlight=False)


def validation_table(rows: Sequence[Validation]) -> Table:
    """Measured and simulated JCT of every run."""
    headings = ["requests", "mean s", "sim. s", "error", "P99 s", "sim. s", "error", "turns", "noise"]
    caption = (
        f"{sum(v.holds for v in rows)} of {len(rows)} hold {MAX_MEAN_ERROR:.0%} of the mean and {MAX_P99_ERROR:.0%} of "
        "P99; noise: how far a turn is from the mean of its turns, at most"
    )
    table = _table("Job completion times, measured and simulated", ["run", "format", "link Gb/s"], headings, caption)
    for v in rows:
        link = "" if v.link_gbps is None else f"{v.link_gbps:g}"
        mean = [f"{v.measured_jct_s:.3f}", f"{v.simulated_jct_s:.3f}", f"{v.mean_error:+.1%}"]
        p99 = [f"{v.measured_p99_s:.3f}", f"{v.simulated_p99_s:.3f}", f"{v.p99_error:+.1%}"]
        style = "" if v.holds else "red"
        turns = [str(len(v.turns_jct_s)), f"{v.noise:.1%}" if len(v.turns_jct_s) > 1 else ""]
        table.add_row(v.run_id, v.kv_cache_dtype, link, str(v.requests), *mean, *p99, *turns, style=style)
    return table


def validation_phases_table(rows: Sequence[Validation]) -> Table:
    """Where measured and simulated time went: mean seconds of every phase, measured first."""
    phases = [
        p for p in PHASES if any(max(v.measured_phases_s[p], v.simulated_phases_s[p]) >= LEAST_SHOWN_S for v in rows)
    ]
    table = _table("Mean seconds of every phase, measured | simulated", ["run"], [p.removesuffix("_s") for p in phases])
    for v in rows:
        table.add_row(v.run_id, *(f"{v.measured_phases_s[p]:.2f} | {v.simulated_phases_s[p]:.2f}" for p in phases))
    return table
