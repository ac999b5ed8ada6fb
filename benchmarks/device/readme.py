"""The GPU's rows of benchmarks/README.md, from what `benchmarks.device` has left.

`python -m benchmarks.device --readme` writes them between two marks; a test compares.
"""

import json
import pathlib
import statistics

from benchmarks.device.steps import STEPS, Step

PAGE = pathlib.Path(__file__).parents[1] / "README.md"
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "device"
MARKS = "<!-- gpu -->", "<!-- /gpu -->"


def _kernels(runs: dict) -> list[str]:
    (figures,) = runs.values()
    tests = figures["tests"]
    passed = sum(test["outcome"] == "passed" for test in tests.values())
    bad = [name.rpartition("::")[2] for name, test in tests.items()
           if test["outcome"] in ("failed", "started")]  # fmt: skip
    skipped = len(tests) - passed - len(bad)
    said = [f"{passed} right, {len(bad)} wrong, {skipped} not possible"]
    said += [f"wrong: {', '.join(f'`{name}`' for name in bad)}"] * bool(bad)
    if (small := figures.get("reduced")) and small.get("shape_TKDFE"):
        sizes = ",".join(map(str, small["shape_TKDFE"]))
        error = small["error"].splitlines()[0][:160].replace("|", "/")
        said.append(
            f"smallest: {small['implementation']}, {small['dtype']}, T,K,D,F,E = "
            f"{sizes}: {error}"
        )
    return said


def _ceiling(runs: dict) -> list[str]:
    (figures,) = runs.values()
    return [
        f"{name} {row['gb_per_s']:,.0f} GB/s"
        if "gb_per_s" in row
        else f"{name} {row['tflops']:,.1f} TFLOP/s"
        for name, row in figures["rows"].items()
    ]


def _tiles(runs: dict) -> list[str]:
    said = []
    for name, figures in runs.items():
        gains = [e["default_us"] / e["us"] for e in figures["entries"]
                 if e["default_us"]]  # fmt: skip
        text = f"{name}: {len(figures['entries'])} operations"
        if gains:
            gain = statistics.geometric_mean(gains)
            text += f", {gain:.2f} times the speed of the defaults"
        said.append(text)
    return said


def _failed(failed: dict) -> str:
    return "; cannot run: " + ", ".join(failed) if failed else ""


def _grouped_matmul(runs: dict) -> list[str]:
    said = []
    for run, figures in runs.items():
        first, second = figures["rows"]["first"], figures["rows"]["second"]
        for kind, loads in first.items():
            for load in loads:
                if kind == "dense" or load not in second.get(kind, {}):
                    continue
                parts = [
                    "/".join(f"{1 / rows[kind][load][part]['ratio']:.2f}"
                             for part in ("fwd", "dx", "dw"))
                    for rows in (first, second)
                ]  # fmt: skip
                said.append(f"{run.split()[0]}, {kind}: {' and '.join(parts)}")
        if failed := figures["failed"]["first"] | figures["failed"]["second"]:
            said.append(run.split()[0] + _failed(failed)[1:])
    return said


def _layers(runs: dict) -> list[str]:
    said, published = [], {}
    for run, figures in runs.items():
        shape = run.split()[0]
        published[shape] = figures["published_tflops"]
        T, K, D, F, _ = figures["shape_TKDFE"]
        for kind, row in figures["rows"].items():
            if "router out" in kind or kind == "limit":
                continue
            fwd, both = row["fwd"]["min_s"], row["fwd_bwd"]["min_s"]
            rates = (6e-12 * T * K * D * F / fwd,
                     12e-12 * T * K * D * F / max(both - fwd, 1e-9))  # fmt: skip
            name = kind.partition(",")[0]
            said.append(f"{shape}, {name}: {rates[0]:.0f} and {rates[1]:.0f} TFLOP/s")
        if figures["failed"]:
            said.append(shape + _failed(figures["failed"])[1:])
    for shape, rows in published.items():
        if "ScatterMoE" in rows:
            said.append("{}, ScatterMoE (published): {} and {}".format(
                shape, *rows["ScatterMoE"]))  # fmt: skip
    return said


def _loads(runs: dict) -> list[str]:
    said = []
    for run, figures in runs.items():
        time = {}
        for kind, row in figures["rows"].items():
            name, _, load = kind.partition(", ")
            if name.startswith("moex") and "router out" not in load:
                time[load] = row["fwd_bwd"]["min_s"]
        if base := time.get("balanced"):
            over = [f"{load} {s / base:.2f}" for load, s in time.items()]
            said.append(f"{run}: {', '.join(over)}")
    return said


def _train(runs: dict) -> list[str]:
    said = []
    for run, figures in runs.items():
        mfu = figures["mfu"]
        text = f"{run}: {figures['tokens_per_s']:,.0f} tokens/s"
        text += "" if mfu is None else f", MFU {100 * mfu:.1f} %"
        said.append(f"{text}, compiled in {figures['compile_s']:.0f} s")
    allocators = {f["environment"].get("allocator") for f in runs.values()} - {None}
    said += [f"host allocator: {', '.join(sorted(map(str, allocators)))}"] * bool(
        allocators
    )
    return said


def _chain(runs: dict) -> list[str]:
    return [
        f"{run}: {100 * figures['seconds']['step']['median']:.1f} s"
        for run, figures in runs.items()
    ]


def _decode(runs: dict) -> list[str]:
    return [
        f"batch {batch}: {sides['rows']['moex']['prefill_tokens_per_s']:,.0f} and "
        f"{sides['rows']['moex']['decode_tokens_per_s']:,.0f}"
        for figures in runs.values()
        for batches in figures["models"].values()
        for batch, sides in batches.items()
    ]


def _offload(runs: dict) -> list[str]:
    said = []
    for figures in runs.values():
        for row in figures["rows"]:
            text = "batch {batch}, {slots}: {tokens_per_s:,.0f}"
            text += ", {hits:.2f} hits" if "hits" in row else ""
            said.append(text.format(**row))
    return said


def _variants(runs: dict) -> list[str]:
    (figures,) = runs.values()
    return [
        f"{name}: {row['fwd']['ratio']:.2f} and {row['fwd_bwd']['ratio']:.2f}"
        for name, row in figures["rows"].items()
    ]


def _train_peers(runs: dict) -> list[str]:
    said = []
    for run, figures in runs.items():
        for rows in (setting["rows"] for setting in figures["settings"].values()):
            theirs = {n: row["ratio"] for n, row in rows.items()
                      if n not in ("moex", "matmuls alone (XLA)")}  # fmt: skip
            if theirs:
                best = min(theirs, key=lambda name: theirs[name])
                said.append(f"{run}: {theirs[best]:.2f} over {best}")
    return said


SAY = {
    "kernels": _kernels,
    "ceiling": _ceiling,
    "tiles": _tiles,
    "grouped_matmul": _grouped_matmul,
    "layers": _layers,
    "loads": _loads,
    "train": _train,
    "chain": _chain,
    "decode": _decode,
    "offload": _offload,
    "variants": _variants,
    "train_peers": _train_peers,
}


def row(step: Step, data: dict | None) -> str:
    """One line of the table; `data` is the content of the step's file, or None."""
    runs = data["runs"] if data else {}
    measured = {n: run["figures"] for n, run in runs.items() if "figures" in run}
    said = SAY[step.name](measured) if measured else []
    wanted = [run.name for process in step.processes for run in process.runs]
    owed = {
        name: runs.get(name, {}).get("status", "")
        for name in wanted
        if runs.get(name, {}).get("status") != "done"
    }
    text = "; ".join(said)
    if owed:
        kinds = sorted({word for word in owed.values() if word not in ("", "skipped")})
        words = "" if len(owed) == len(wanted) else ": " + ", ".join(owed)
        words += f" ({', '.join(kinds)})" if kinds else ""
        text = "; ".join(filter(None, (text, f"**owed**{words}")))
    where = ""
    for run in runs.values():
        if "figures" in run:
            where = f"{run['device'].split(',')[0]}, JAX {run['versions']['jax']}"
            where += f", {run['commit']}" if run["commit"] else ""
    command = f"`python -m benchmarks.device --steps={step.name} --out=FOLDER`"
    return f"| {step.title} | {text} | {where or 'H100 or H200'} | {command} |"


def table(folder: pathlib.Path) -> str:
    """The rows of all files that the folder has."""
    lines = ["| figure | result | device | command |", "|---|---|---|---|"]
    for step in STEPS:
        file = folder / f"{step.name}.json"
        there = file.exists()
        data = json.loads(file.read_text(encoding="utf-8")) if there else None
        lines.append(row(step, data))
    return "\n".join(lines)


def write(folder: pathlib.Path, page: pathlib.Path = PAGE) -> None:
    """Puts the table between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    text = f"{before}{MARKS[0]}\n{table(folder)}\n{MARKS[1]}{after}"
    page.write_text(text, encoding="utf-8")
