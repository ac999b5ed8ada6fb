"""`moex report`."""

from moex.commands import Verb
from moex.commands.arguments import add_run
from moex.config.arguments import path
from moex.process import use_cpu


class Command(Verb):
    """Write a page about a run: warnings, curves, routing, config.

    The page is one HTML file that needs no network; with a trace it also shows what the
    experts specialise in.
    """

    examples = """
    Examples:
      moex report runs/quickstart
      moex report runs/quickstart --trace=trace.parquet --out=quickstart.html
    """
    usage = "RUN [--trace=FILE] [--compare-trace=FILE] [--sums=FILE] [--out=FILE.html]"
    refuses_config = "takes the config of the run"

    def add(self, parser):
        add_run(parser)
        parser.add_argument(
            "--trace", type=path, metavar="FILE", help="of `moex trace`"
        )
        parser.add_argument(
            "--compare-trace",
            type=path,
            metavar="FILE",
            help="trace of the same tokens with another checkpoint",
        )
        parser.add_argument(
            "--token",
            action="append",
            default=[],
            metavar="TOKEN",
            help="show the experts that go with this token; repeat it for several",
        )
        parser.add_argument(
            "--sums",
            type=path,
            metavar="FILE",
            help="of `moex trace --sums`: show which experts matter and are alike",
        )
        parser.add_argument(
            "--out", type=path, metavar="FILE", help="default: RUN/report.html"
        )

    def output(self, args):
        return args.out or args.run.report

    def run(self, args, config_args):
        from moex.report.write import write_report

        use_cpu()
        print(
            write_report(
                args.run,
                trace=args.trace,
                compare_trace=args.compare_trace,
                markers=args.token,
                sums=args.sums,
                out=args.out,
            )
        )
