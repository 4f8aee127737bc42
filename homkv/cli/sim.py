"""``homkv sim``: prefill and decode instances simulated from measured step times."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from homkv.cli.sim_work import (
    describe,
    make_requests,
    make_scenario,
    plot_paper,
    plot_run,
    plot_sweeps,
    plot_validation,
    print_paths,
    progress,
    run_lines,
    simulate_formats,
    sweeps,
    write_lines,
    write_runs,
)
from homkv.errors import UnsupportedError

RUN_FORMATS = ("fp16", "fp8", "hack", "balanced", "small")
app = typer.Typer(help="Simulate prefill and decode instances from measured step times.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="Model, or an unambiguous part of its name.")]
Gpus = Annotated[str, typer.Option("--gpu", help="GPU of both sides.")]
PrefillGpu = Annotated[str | None, typer.Option(help="GPU of prefill, where it differs.")]
DecodeGpu = Annotated[str | None, typer.Option(help="GPU of decode, where it differs.")]
PrefillTp = Annotated[
    int | None, typer.Option(help="GPUs of a prefill instance. Default: fewest that hold the weights.")
]
DecodeTp = Annotated[int | None, typer.Option(help="GPUs of a decode instance. Default: fewest that hold the weights.")]
LinkGbps = Annotated[float | None, typer.Option(help="Link of every instance. Default: the usual cloud instance's.")]
Formats = Annotated[list[str] | None, typer.Option("--kv-cache-dtype", help="Format; repeat the option.")]
Trace = Annotated[Path | None, typer.Option(help="Trace of requests: homkv, Mooncake, Azure or Vidur, gzip or not.")]
Profile = Annotated[str, typer.Option(help="Lengths when there is no trace; see homkv/sim/data/profiles.json.")]
Rate = Annotated[float | None, typer.Option(help="Requests per second, Poisson. Default: the trace's times, else 1.")]
Num = Annotated[int, typer.Option("--requests", help="At most this many requests.")]
Seed = Annotated[int, typer.Option(help="Of arrivals and lengths.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write one line per result to this file.")]
Plots = Annotated[Path | None, typer.Option(help="Folder for plots.")]
Overlap = Annotated[bool, typer.Option(help="Send layers while the next ones compute.")]


@app.command()
def run(
    model: Model = "llama-3.1-8b",
    gpu: Gpus = "h100",
    prefill_gpu: PrefillGpu = None,
    decode_gpu: DecodeGpu = None,
    prefill_tp: PrefillTp = None,
    decode_tp: DecodeTp = None,
    link_gbps: LinkGbps = None,
    kv_cache_dtype: Formats = None,
    num_prefill: Annotated[int, typer.Option(help="Prefill instances.")] = 1,
    num_decode: Annotated[int, typer.Option(help="Decode instances.")] = 1,
    trace: Trace = None,
    profile: Profile = "long",
    requests_per_s: Rate = None,
    requests: Num = 1000,
    seed: Seed = 0,
    overlap: Overlap = True,
    swap: Annotated[bool, typer.Option(help="KV without room waits in the decode host's memory.")] = False,
    prefix_gb: Annotated[float | None, typer.Option(help="Prefix cache of this size. Default: none.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write a record of every request to this file.")] = None,
    json_file: JsonFile = None,
    plots: Plots = None,
) -> None:
    """Simulate one deployment in several formats: JCT, TTFT, TPOT and where the time goes."""
    from dataclasses import replace

    from homkv.sim.report import summary_table
    from homkv.sim.summary import summarize

    base = make_scenario(model, gpu, prefill_gpu, decode_gpu, prefill_tp, decode_tp, link_gbps, overlap)
    base = replace(base, num_prefill=num_prefill, num_decode=num_decode, prefix_gb=prefix_gb)
    base = replace(base, when_full="swap" if swap else "wait")
    work = make_requests(trace, profile, requests_per_s, requests, seed)
    outcomes, cpu_s = simulate_formats(base, work, kv_cache_dtype or RUN_FORMATS)
    rows = {name: summarize(outcome) for name, outcome in outcomes.items()}
    Console().print(summary_table(rows, f"{model}, {base.prefill_gpu} to {base.decode_gpu}, {len(work):,} requests"))
    write_lines(json_file, run_lines(model, rows, cpu_s))
    if record is not None:
        write_runs(record, base, outcomes, seed)
    if plots is not None:
        print_paths(plot_run(rows, model, plots))


@app.command()
def paper(
    model: Annotated[str, typer.Option(help="Also mistral-7b, phi-3-14b, yi-34b, falcon-180b.")] = "llama-3.1-70b",
    prefill_gpu: Annotated[list[str] | None, typer.Option(help="Repeat the option. Default: the paper's five.")] = None,
    profile: Annotated[list[str] | None, typer.Option(help="Repeat the option. Default: all.")] = None,
    load: Annotated[list[float] | None, typer.Option(help="Of 16-bit capacity; repeat the option.")] = None,
    requests: Num = 500,
    seed: Seed = 0,
    artifact: Annotated[bool, typer.Option(help="The authors' own two-GPU runs, too.")] = True,
    json_file: JsonFile = None,
    plots: Plots = None,
) -> None:
    """Simulate HACK's experiment (five prefill GPUs, A100 decode) beside the numbers that it claims."""
    from homkv.sim import paper as setting
    from homkv.sim.claims import DATA_SETS, grid, parts
    from homkv.sim.report import ablation_table, artifact_table, claims_table, grid_table, paper_tables, parts_table

    gpus, names = prefill_gpu or setting.PREFILL_GPUS, profile or setting.PROFILES
    loads = load or setting.LOADS
    if any(not 0 < x < 100 for x in loads):
        raise UnsupportedError(f"expected loads above 0 of the 16-bit system's capacity, found {loads}")
    console = Console()
    common: dict[str, Any] = {"num_requests": requests, "seed": seed, "model": model}
    with progress(len(gpus) * len(names) * len(loads) * len(setting.VARIANTS), "") as advance:
        rows = list(setting.run_paper(gpus, names, loads, on_run=advance, **common))
    with progress(5 * (len(setting.ABLATIONS) + 1), "") as advance:
        ablations = list(setting.run_ablations(names=("long", *DATA_SETS), on_run=advance, **common))
    compared, said = grid(rows), parts(rows, ablations)
    published = []
    if artifact:
        with progress(None, "") as advance:
            published = list(setting.run_artifact(on_run=advance))
        console.print(artifact_table(published))
    tables = [*paper_tables(rows), grid_table(compared), claims_table(rows), parts_table(said)]
    tables.append(ablation_table([row for row in ablations if row.profile == "long"]))
    for table in tables:
        console.print(table)
    kinds = ([*rows, *ablations], published, compared, said)
    write_lines(json_file, [row.to_dict() for members in kinds for row in members])
    if plots is not None:
        print_paths(plot_paper(rows, plots))


@app.command()
def whatif(
    model: Model = "llama-3.1-70b",
    gpu: Gpus = "h100",
    prefill_gpu: PrefillGpu = None,
    decode_gpu: DecodeGpu = None,
    prefill_tp: PrefillTp = None,
    decode_tp: DecodeTp = None,
    link_gbps: LinkGbps = None,
    kv_cache_dtype: Formats = None,
    trace: Trace = None,
    profile: Profile = "long",
    requests_per_s: Rate = None,
    requests: Num = 1000,
    seed: Seed = 0,
    overlap: Overlap = True,
    prefill_price: Annotated[float, typer.Option(help="Of a prefill GPU and hour.")] = 1.0,
    decode_price: Annotated[float, typer.Option(help="Of a decode GPU and hour.")] = 1.0,
    utilisation: Annotated[
        float, typer.Option(help="Of the bottleneck, to count instances for; less for bursts.")
    ] = 0.8,
    min_gain: Annotated[float, typer.Option(help="Less than this of cost or JCT is not worth compressing for.")] = 0.1,
    sweep: Annotated[bool, typer.Option(help="Also over link, rate and prompt length.")] = False,
    json_file: JsonFile = None,
    plots: Plots = None,
) -> None:
    """Say which format, how many instances of either kind, and whether compressing KV is worth it here at all."""
    from homkv.sim.report import print_advice
    from homkv.sim.whatif import FORMATS, Prices, advise, options

    base = make_scenario(model, gpu, prefill_gpu, decode_gpu, prefill_tp, decode_tp, link_gbps, overlap)
    work = make_requests(trace, profile, requests_per_s, requests, seed)
    names, prices = tuple(kv_cache_dtype or FORMATS), Prices(prefill_price, decode_price)
    with progress(len(names), "") as advance:
        found = options(base, work, prices, names, utilisation, advance)
    title = f"{model}, {base.prefill_gpu} to {base.decode_gpu}: {describe(work)}"
    print_advice(Console(), found, advise(found, min_gain), title)
    first = found.found[0]  # 16 bits by default, unless they cannot serve this
    points = list(sweeps(base, work, prices, names, first, utilisation)) if sweep or plots is not None else []
    write_lines(json_file, [*(row.to_dict() for row in found.found), *(point.to_dict() for point in points)])
    if plots is not None:
        print_paths(plot_sweeps(points, title, plots))


@app.command()
def validate(
    records: Annotated[list[Path], typer.Argument(help="Records of real replays: homkv bench jct, homkv bench pd.")],
    gpu: Annotated[str | None, typer.Option(help="Take step times from this GPU's tables, none from records.")] = None,
    model: Annotated[str | None, typer.Option(help="With --gpu: the model of the records.")] = None,
    max_load: Annotated[float, typer.Option(help="Leave out turns with a higher load average of one minute.")] = 1e9,
    check: Annotated[bool, typer.Option(help="Exit with 1 if a run misses 10 % of the mean or 20 % of P99.")] = False,
    json_file: JsonFile = None,
    plots: Plots = None,
) -> None:
    """Simulate the requests of real records with their own step times, and compare job completion times."""
    from homkv.sim.fitted import fit
    from homkv.sim.report import validation_phases_table, validation_table
    from homkv.sim.validate import tables
    from homkv.sim.validate import validate as compare

    if (gpu is None) != (model is None):
        raise UnsupportedError("expected --gpu together with --model, found one of them; give both or none")
    costs_of = fit if gpu is None or model is None else tables(gpu, model)
    rows = compare(records, costs_of, max_load)
    Console().print(validation_table(rows), validation_phases_table(rows), sep="\n")
    write_lines(json_file, [row.to_dict() for row in rows])
    if plots is not None:
        source = "measured steps" if gpu is None else f"tables of {gpu}"
        print_paths(plot_validation(rows, source, plots, records[0]))
    if check and not all(row.holds for row in rows):
        raise typer.Exit(1)
