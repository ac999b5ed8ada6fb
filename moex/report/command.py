"""`moex report`: a run directory, and a trace of it, as one page of HTML."""

import pathlib

from moex.config import ConfigError
from moex.data.files import atomic_write
from moex.report import about, routing, training
from moex.report.health import examine
from moex.report.material import read
from moex.report.page import render


def run(
    path: pathlib.Path,
    *,
    trace: pathlib.Path | None = None,
    compare_trace: pathlib.Path | None = None,
    out: pathlib.Path | None = None,
) -> str:
    """Write the page; returns what `moex report` prints.

    Args:
      path: run directory.
      trace: file of `moex trace`; None: the page says that there is none.
      compare_trace: another trace of the same tokens, of another checkpoint.
      out: the file; None: `RUN/report.html`.

    Raises:
      ConfigError: for what is no run, no trace, or cannot be written.
    """
    out = path / "report.html" if out is None else out
    check(out, trace, compare_trace)
    material = read(path)
    health = examine(material)
    sections = [
        training.section(material),
        *routing.sections(material),
        about.samples(material),
        about.config(material),
        about.environment(material),
    ]
    name = path.resolve().name
    page = render(f"moex report: {name}", about.summary(material), health, sections)
    atomic_write(out, page)
    texts = [f"  {kind}: {t}" for kind, ts in health.groups.items() for t in ts]
    size = len(page.encode()) / 1e6
    return "\n".join([f"report: {out} ({size:.1f} MB)", health.headline, *texts])


def check(out, trace, compare_trace) -> None:
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
    for flag, file in (("--trace", trace), ("--compare-trace", compare_trace)):
        if file is not None and not file.exists():
            raise ConfigError(f"{flag}={file}: no such file; `moex trace` writes it.")
