"""`moex analyse`; see docs/traces.md."""

from moex.commands import Verb
from moex.commands.arguments import add_json
from moex.config.arguments import path
from moex.json_files import dump_json


class Command(Verb):
    """Analyse a trace: how every router uses its experts.

    It prints the balance, how much experts depend on domain and token, and how well the
    experts of one layer predict those of the next (docs/traces.md); it needs no model.
    """

    refuses_config = "takes a trace and no config"

    def add(self, parser):
        parser.add_argument("trace", type=path, help="file of `moex trace`")
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

    def run(self, args, config_args):
        from moex.analysis import output
        from moex.analysis.gates import by_type as of_types
        from moex.analysis.gates import table as gate_table
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
            if gates:
                by_type = {k: v.tolist() for k, v in of_types(gates).items()}
                told |= {"adapters_by_type": by_type}
            print(dump_json(told))
            return
        print(f"{found.run} at step {found.step}, {found.num_tokens:,} tokens:")
        print(output.table(rows))
        for marker, lines in output.marker_lines(found).items():
            print(f"experts of {marker!r} (nPMI, share of its tokens): {lines}")
        print(f"\n{output.legend(rows)}")
        if gates:
            print(f"\n{gate_table(gates)}")
