"""A run directory, and a trace of it, as one page of HTML: `moex report`."""

import pathlib
from collections.abc import Sequence

from moex.analysis.summary import analyse, compare
from moex.analysis.sums import Sums
from moex.analysis.trace import Trace
from moex.config.base import ConfigError
from moex.data.files import atomic_write
from moex.report import about, gates, routing, tracing, training
from moex.report.health import examine
from moex.report.material import read
from moex.report.page import Section, render
from moex.report.sums import section as of_sums
from moex.runs.directory import Place, RunDir


def write_report(
    place: Place,
    *,
    trace: pathlib.Path | None = None,
    compare_trace: pathlib.Path | None = None,
    markers: Sequence[str] = (),
    sums: pathlib.Path | None = None,
    out: pathlib.Path | None = None,
) -> str:
    """Write the page; returns what `moex report` prints.

    Args:
      trace: file of `moex trace`; None: the page says that there is none.
      compare_trace: another trace of the same tokens, of another checkpoint.
      markers: tokens whose experts are looked for.
      sums: file of `moex trace --sums`; None: the page has no section on them.
      out: the file; None: `RUN/report.html`.

    Raises:
      ConfigError: if a path is no run, is no trace, or cannot be written.
    """
    run = RunDir.of(place)
    out = run.report if out is None else out
    check(out, trace, compare_trace, markers)
    material = read(run)
    found, overlap, whose = _traces(trace, compare_trace, markers)
    health = examine(material, None if found is None else tracing.figures(found))
    sections = [
        training.section(material),
        *routing.sections(material),
        *gates.sections(material),
        *tracing.sections(found, overlap, whose),
        *_sums(sums),
        about.samples(material),
        about.config(material),
        about.environment(material),
    ]
    name = run.path.resolve().name
    page = render(f"moex report: {name}", about.summary(material), health, sections)
    atomic_write(out, page)
    texts = [f"  {kind}: {t}" for kind, ts in health.groups.items() for t in ts]
    size = len(page.encode()) / 1e6
    return "\n".join([f"report: {out} ({size:.1f} MB)", health.headline, *texts])


def _traces(path, other_path, markers):
    """`(analysis, overlap with the other trace, whose trace it is)`; None: no trace."""
    if path is None:
        return None, None, ""
    with Trace.open(path) as trace:
        found = analyse(trace, markers=markers)
        whose = f"{path}: of {found.run} at step {found.step:,}"
        if other_path is None:
            return found, None, f"{whose}."
        with Trace.open(other_path) as other:
            overlap = compare(trace, other)
            header = other.header
    return found, overlap, f"{whose}, beside {header.run} at step {header.step:,}."


def _sums(path) -> list[Section]:
    if path is None:
        return []
    found = Sums.read(path)
    return [of_sums(found, f"{path}: of {found.run} at step {found.step:,}.")]


def check(out, trace, compare_trace, markers) -> None:
    """Check the arguments before anything is read.

    Raises:
      ConfigError: for a file that is not there, or cannot be written.
    """
    if out.suffix != ".html":
        raise ConfigError(f"--out={out}: must end in .html.")
    if not out.parent.is_dir() and out.parent != out:
        raise ConfigError(f"--out={out}: there is no folder {out.parent}.")
    if compare_trace is not None and trace is None:
        raise ConfigError("--compare-trace: is beside --trace; give both.")
    if markers and trace is None:
        raise ConfigError("--token: is beside --trace; give both.")
    for flag, file in (("--trace", trace), ("--compare-trace", compare_trace)):
        if file is not None and not file.exists():
            raise ConfigError(f"{flag}={file}: no such file; `moex trace` writes it.")
