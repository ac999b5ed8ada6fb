"""The part of an experiment's README that moex writes: tables and verdicts."""

import pathlib
from collections.abc import Sequence

from moex.analysis.compare import Estimate
from moex.config.base import ConfigError
from moex.data.files import atomic_write
from moex.experiment.claims import Claim, judge
from moex.experiment.contract import SIZES, Column, Table
from moex.experiment.find import Found
from moex.experiment.results import NotDone, Results

BEGIN = "<!-- results: `moex experiment run` writes what follows -->"
END = "<!-- end of results -->"


def written(estimate: Estimate, form: str, scale: float = 1.0) -> str:
    """A mean and half of its interval, as text."""
    text = form.format(scale * estimate.mean)
    if not estimate.half_width:  # one seed, or the same for all
        return text
    return f"{text} ± {form.format(scale * estimate.half_width).lstrip('+')}"


def rows_of(results: Results, table: Table) -> list[list[str]]:
    """The rows of a table, its head first; arms that were not done have dashes."""
    first, *others = table.columns
    heads = ["arm", "seeds", first.head]
    heads += [f"− {table.against}"] if table.against else []
    rows = [[*heads, *(column.head for column in others)]]
    for arm in table.arms:
        row = [arm, str(len(results.arms.get(arm, {}))), _cell(results, arm, first)]
        if table.against:
            row.append(_against(results, arm, table.against, first))
        rows.append([*row, *(_cell(results, arm, column) for column in others)])
    return rows


def _cell(results: Results, arm: str, column: Column) -> str:
    try:
        found = results.mean(arm, column.figure)
    except NotDone:
        return "–"
    return written(found, column.form, column.scale)


def _against(results: Results, arm: str, against: str, column: Column) -> str:
    if arm == against:
        return ""
    try:
        found = results.difference(arm, against, column.figure)
    except NotDone:
        return "–"
    return written(found, column.form.replace("{:", "{:+"), column.scale)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; all columns but the first are aligned to the right."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, f"|---|{'---:|' * (len(rows[0]) - 1)}", *body]


def claims_of(found: Found, results: Results) -> list[Claim]:
    """The verdicts on the claims of an experiment."""
    criteria = found.criteria()
    return judge(results, criteria.MECHANISMS, criteria.CLAIMS)


def _claim_lines(claims: Sequence[Claim]) -> list[str]:
    lines = []
    for claim in claims:
        verdict, numbers = claim.finding.verdict, claim.finding.numbers
        kind = "mechanism: " if claim.gates else ""
        lines.append(f"- {kind}{claim.text} **{verdict}** ({numbers})")
    return lines


def section(found: Found, size: str) -> str:
    """The text of the README about one size."""
    experiment, results = found.at(size), found.results(size)
    lines = [f"### `--size={size}`", ""]
    machines = {own.get("machine") for s in results.arms.values() for own in s.values()}
    minutes = sum(
        own.get("minutes", 0) for s in results.arms.values() for own in s.values()
    )
    if not any(results.arms.values()):
        return "\n".join([*lines, "Not run yet.", ""])
    lines += [
        f"{len(experiment.arms)} arms. ± is half the 95 % interval over seeds "
        "(Student's t); differences are taken seed by seed. All seeds of all arms took "
        f"{minutes:.0f} minutes on {' and '.join(sorted(filter(None, machines)))}.",
        "",
        *_claim_lines(claims_of(found, results)),
        "",
    ]
    for table in experiment.tables:
        lines += [f"{table.title}:", "", *markdown(rows_of(results, table)), ""]
    lines += found.extra_lines(results, size)
    lines += [f"![{found.question}](plot_{size}.png)", ""]
    return "\n".join(lines)


def results_part(found: Found) -> str:
    """The whole part of the README that moex writes, with its marks."""
    parts = []
    for size in SIZES:
        parts.append(section(found, size))
    return "\n".join([BEGIN, "", *parts, END])


def _split(readme: pathlib.Path) -> tuple[str, str, str]:
    """The README before, inside and behind the marks.

    Raises:
      ConfigError: if there is no file or it lacks the marks.
    """
    if not readme.is_file():
        raise ConfigError(f"{readme}: an experiment needs this file.")
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    part, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{readme}: must have these two lines:\n  {BEGIN}\n  {END}")
    return head, begin + part + end, tail


def check_readme(found: Found) -> None:
    """Raise `ConfigError` if the README is missing, or lacks the marks."""
    _split(found.folder / "README.md")


def write_readme(found: Found) -> None:
    """Write the results into the README."""
    readme = found.folder / "README.md"
    head, _, tail = _split(readme)
    atomic_write(readme, head + results_part(found) + tail)


def readme_is_right(found: Found) -> bool:
    """Tell whether the README says what results.json and criteria.py give."""
    return _split(found.folder / "README.md")[1] == results_part(found)
