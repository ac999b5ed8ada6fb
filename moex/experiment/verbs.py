"""The actions of `moex experiment`: list, run and check."""

import pathlib
from collections.abc import Callable, Sequence

from moex.config.base import ConfigError, RunError
from moex.experiment import page, runner
from moex.experiment.contract import SIZES, Experiment
from moex.experiment.find import Found, find, find_all
from moex.experiment.plot import draw
from moex.experiment.runner import Place, Runner
from moex.terminal import aligned, clock

Say = Callable[[str], None]


def chosen(names: Sequence[str]) -> list[Found]:
    """The experiments of some names, or all."""
    return [find(name) for name in names] if names else find_all()


def listed(names: Sequence[str]) -> str:
    """A table of experiments: what is done of them, and their questions."""
    rows: list[tuple[str, ...]] = [("experiment", *SIZES, "question")]
    for found in chosen(names):
        done = []
        for size in SIZES:
            experiment = found.at(size)
            known = found.results(size).arms
            units = runner.choose(experiment, None, None)
            ready = sum(seed in known.get(arm, {}) for arm, seed in units)
            done.append(f"{ready}/{len(units)}")
        rows.append((found.name, *done, found.question))
    return aligned(rows, left=(0, 3))


def seeds_of(text: str | None) -> list[int] | None:
    """The numbers of `--seeds`, each once.

    Raises:
      ConfigError: if one is none.
    """
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--seeds = {text!r}: must be whole numbers, such as 0,1,2.")
    return list(dict.fromkeys(map(int, parts)))


def run(args, say: Say) -> None:
    """Do what is left of an experiment, and write its README and plots."""
    (name,) = args.names
    found, size = find(name), args.size or "cpu"
    experiment = found.at(size)
    arms = None if args.arms is None else args.arms.split(",")
    units = runner.choose(experiment, arms, seeds_of(args.seeds))
    default = pathlib.Path("runs", "experiments", name, size)
    place = Place(experiment, args.workdir or default)
    found.criteria()  # mistakes show now, and not after hours
    page.check_readme(found)
    if args.again and not args.dry_run:
        runner.clear(place, units)
    if args.in_process and not args.dry_run:
        known = found.file.of(experiment, size).arms
        for unit in units:
            if not place.is_done(unit) or unit.seed not in known[unit.arm]:
                runner.do(found, size, place, unit)
        return
    if args.again:
        todo = units
    else:
        for line in found.file.stale(experiment, size):
            say(line)
        todo = runner.left(found, size, place, units)
    made = Runner(found, size, place, 1 if args.jobs is None else args.jobs, say)
    if args.dry_run:
        say(_plan(found, size, experiment, todo))
        return
    if todo:
        say(_plan(found, size, experiment, todo).splitlines()[-1])
        made.run(todo)
    else:
        say("everything was done before")
    refresh(found)
    _show(found, size, say)
    if made.children.asked is not None:
        raise KeyboardInterrupt("interrupted; the same command goes on from here")
    if made.failed:
        raise RunError(f"{len(made.failed)} of {len(todo)} failed; see above")


def _plan(found: Found, size: str, experiment: Experiment, todo) -> str:
    results = found.file.of(experiment, size)
    minutes = {u: runner.minutes_of(experiment, results, u.arm) for u in todo}
    known = {u: bool(results.arms.get(u.arm)) for u in todo}
    rows = [
        (str(unit), f"{minutes[unit]:.1f} min", "" if known[unit] else "as expected")
        for unit in todo
    ]
    total = f"{len(todo)} to do, about {clock(60 * sum(minutes.values()))} in all"
    return "\n".join([aligned(rows, left=(0, 2)), total]) if rows else total


def refresh(found: Found) -> None:
    """Write the README and the plots of an experiment from its results."""
    for size in SIZES:
        results = found.results(size)
        draw(found.at(size), results, found.folder / f"plot_{size}.png")
        if any(results.arms.values()):
            found.draw_extra(results, size)
    page.write_readme(found)


def _show(found: Found, size: str, say: Say) -> None:
    results = found.results(size)
    for table in found.at(size).tables:
        say(f"\n{table.title}")
        say(aligned(page.rows_of(results, table)))
    say("")
    for claim in page.claims_of(found, results):
        say(str(claim))


def check(names: Sequence[str], size: str | None, say: Say) -> str:
    """Make tables and verdicts again from results.json, and compare the README.

    Returns:
      A line on what is wrong: a mechanism that does not hold, results of another arm,
      a README that says something else; "" if all is right.
    """
    wrong = []
    for found in chosen(names):
        for own in SIZES if size is None else (size,):
            experiment = found.at(own)
            wrong += found.file.stale(experiment, own)
            results = found.results(own)
            if not any(results.arms.values()):
                say(f"{found.name}, {own}: not run yet")
                continue
            for claim in page.claims_of(found, results):
                say(f"{found.name}, {own}: {claim}")
                if claim.failed:
                    wrong.append(f"{found.name}, {own}: mechanism: {claim.text}")
        if not page.readme_is_right(found):
            wrong.append(
                f"{found.folder / 'README.md'}: says something else than results.json; "
                f"`moex experiment check {found.name} --write` writes it"
            )
    return "; ".join(wrong)
