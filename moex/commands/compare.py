"""`moex compare`: a table of runs, a file of them, or whether two are equal."""

from moex.commands import Verb
from moex.commands.arguments import add_json
from moex.config.arguments import path, tolerance
from moex.config.base import ConfigError, require
from moex.json_files import dump_json
from moex.process import use_cpu
from moex.terminal import line_width

ENDINGS = (".html", ".png", ".csv", ".json")


class Command(Verb):
    """Compare runs in a table: size, work, time and losses.

    Runs whose configs differ only in the seed are one row, with 95 % intervals. The
    folder of a sweep stands for its runs.
    """

    examples = """
    Examples:
      moex compare runs/quickstart runs/k4 --out=k4.html
      moex compare runs/sweep --json
      moex compare runs/first runs/again --assert-equal=1e-6
      moex compare runs/idea --ladder=runs/ladder
    """
    usage = "RUN RUN ... [options]"
    refuses_config = "takes the configs of the runs"

    def add(self, parser):
        parser.add_argument("runs", nargs="+", type=path, metavar="RUN")
        add_json(parser)
        parser.add_argument(
            "--out",
            type=path,
            metavar="FILE",
            help="write the table with a plot of loss against tokens, FLOPs and time "
            "(.html), the plot (.png), its points (.csv), what --json prints (.json)",
        )
        parser.add_argument(
            "--assert-equal",
            nargs="?",
            type=tolerance,
            const=(0.0, 0.0),
            metavar="RTOL[,ATOL]",
            help="fail at the first figure in which two runs differ, times apart: by "
            "more than RTOL of the larger value and more than ATOL (both 0)",
        )

        parser.add_argument(
            "--ladder",
            type=path,
            metavar="RUNS",
            help="judge the runs by a ladder of baselines of growing size, a folder of "
            "runs or a file of `moex compare --out=ladder.json`: the compute and time "
            "that they save for the same loss (docs/experiments.md)",
        )

    def run(self, args, config_args):
        from moex.analysis.compare import make_groups, table
        from moex.analysis.equality import Tolerance, assert_equal
        from moex.analysis.judging import judged
        from moex.analysis.plotting import write_comparison
        from moex.analysis.reading import read_runs

        use_cpu()
        out = args.out
        if args.assert_equal is not None:
            others = {"json": args.json, "out": out, "ladder": args.ladder}
            if given := [name for name, value in others.items() if value]:
                flag = f"--{given[0]}"
                raise ConfigError(
                    f"{flag}: --assert-equal says one line; leave it out."
                )
            print(assert_equal(args.runs, Tolerance(*args.assert_equal)))
            return
        if args.ladder is not None:
            if out is not None:
                raise ConfigError("--out: --ladder prints a judgement; leave it out.")
            print(judged(args.runs, args.ladder, args.json))
            return
        if out is not None:  # check this before anything is read
            allowed = f"a name that ends in {', '.join(ENDINGS)}"
            require(out.suffix in ENDINGS, "--out", str(out), allowed)
            require(out.parent.is_dir(), "--out", str(out), "in a folder that exists")
        groups = make_groups(read_runs(args.runs))
        data = dump_json({"groups": [group.to_dict() for group in groups]})
        if out is not None:
            write_comparison(groups, data, out)
        print(data if args.json else table(groups, width=line_width()))
        if out is not None and not args.json:
            print(f"written: {out}")
