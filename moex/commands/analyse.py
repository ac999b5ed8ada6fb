"""`moex analyse`; see docs/traces.md and docs/steering.md."""

from moex.analysis.flags import add_ranking, ranks
from moex.commands import Verb
from moex.commands.arguments import add_json
from moex.config.arguments import path
from moex.json_files import dump_json


class Command(Verb):
    """Analyse a trace: how every router uses its experts.

    It prints the balance, how much experts depend on domain and token, and how well the
    experts of one layer predict those of the next (docs/traces.md); it needs no model.
    With --npmi or --risk-difference it ranks experts for steering (docs/steering.md).
    """

    examples = """
    Examples:
      moex analyse trace.parquet
      moex analyse trace.parquet --npmi=. --against=, --min-support=0
      moex analyse trace.parquet --npmi-span , . --min-support=0 --steer-out=s.json
    """
    refuses_config = "takes a trace and no config"

    def add(self, parser):
        parser.add_argument(
            "trace",
            type=path,
            help="file of `moex trace`; to rank experts, or its sums",
        )
        parser.add_argument(
            "--compare",
            type=path,
            metavar="TRACE",
            help="compare with the routing of another checkpoint on the same data",
        )
        parser.add_argument(
            "--token",
            action="append",
            metavar="TEXT",
            help="list the experts that go with this token, such as '<think>'; "
            "repeat it",
        )
        parser.add_argument(
            "--out", type=path, help="numpy archive (.npz) of all counts"
        )
        add_json(parser)
        add_ranking(parser)

    def output(self, args):
        return args.steer_out or args.out

    def run(self, args, config_args):
        if ranks(args):
            from moex.analysis.ranking import rank

            rank(args)
        else:
            _analyse(args)


def _analyse(args) -> None:
    from moex.analysis import gates as of_adapters
    from moex.analysis import output
    from moex.analysis.statistics import saturation
    from moex.analysis.summary import analyse, compare
    from moex.analysis.trace import Trace
    from moex.analysis.writer import check_new

    if args.out is not None:
        check_new(args.out)
    with Trace.open(args.trace) as trace:
        sums = {}
        if args.compare is not None:
            with Trace.open(args.compare) as other:
                sums = compare(trace, other)
        found, gates = analyse(trace, markers=args.token or ()), trace.gates
    rows = output.figures(found)
    for label, sums_D2 in sums.items():
        total_D2 = sums_D2.sum(axis=0)[None]
        rows[label]["saturation"] = float(saturation(total_D2)[0])
    if args.out is not None:
        output.save(found, args.out)
    if args.json:
        told = {"run": found.run, "step": found.step, "layers": rows}
        print(dump_json(told | of_adapters.plain(gates)))
        return
    print(f"{found.run} at step {found.step}, {found.num_tokens:,} tokens:")
    print(output.table(rows))
    for marker, lines in output.marker_lines(found).items():
        print(f"experts of {marker!r} (nPMI, share of its tokens): {lines}")
    print(f"\n{output.legend(rows)}")
    if gates:
        print(f"\n{of_adapters.table(gates)}")
