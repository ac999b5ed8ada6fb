"""`moex analyse`; see docs/traces.md and docs/steering.md."""

import dataclasses

from moex.commands import Verb
from moex.commands.arguments import add_json, add_markers, markers_of
from moex.config.arguments import path, positive
from moex.config.base import ConfigError, require
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
        rank = parser.add_argument_group(
            "experts to steer (docs/steering.md)", "These print a ranking alone."
        )
        add_markers(rank, "npmi", "rank experts that go with this token")
        add_markers(rank, "against", "rank those lower that go with this token")
        rank.add_argument(
            "--risk-difference",
            type=path,
            metavar="TRACE",
            help="of the same prompts without the behaviour: rank experts by the share "
            "of tokens that have them here, less the share there",
        )
        rank.add_argument(
            "--from",
            dest="start",
            metavar="TEXT",
            help="only count the tokens of a document from this one on: what is before "
            "is its prompt",
        )
        rank.add_argument(
            "--min-support",
            type=float,
            metavar="SHARE",
            help="leave out experts that fewer of a marker's positions have; default: "
            "0.5 for a token, 0.1 for a span",
        )
        rank.add_argument(
            "--top", type=positive, default=2, help="how many experts; default: 2"
        )
        rank.add_argument(
            "--steer-out",
            type=path,
            metavar="FILE",
            help="write a steering file: it scales their gates, or with "
            "--risk-difference forces or bans them",
        )
        rank.add_argument(
            "--scale", type=float, default=4.0, help="the factor of gates; default: 4"
        )

    def output(self, args):
        return args.steer_out or args.out

    def run(self, args, config_args):
        if args.npmi or args.npmi_span or args.risk_difference:
            _rank(args)
            return
        for name in ("against", "against_span", "start", "min_support", "steer_out"):
            if getattr(args, name):
                flag = "from" if name == "start" else name.replace("_", "-")
                raise ConfigError(f"--{flag}: is for --npmi or --risk-difference.")
        _analyse(args)


def _analyse(args) -> None:
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


def _rank(args) -> None:
    """Rank experts by nPMI with markers, or by the difference of two traces."""
    from moex.analysis import marking
    from moex.analysis.scores import best

    share = args.min_support
    ok = share is None or 0 <= share <= 1
    require(ok, "--min-support", share, "in [0, 1]")
    require(0 <= args.scale < float("inf"), "--scale", args.scale, "0 or more")
    markers, against = markers_of(args, "npmi"), markers_of(args, "against")
    if args.steer_out is not None:
        folder = args.steer_out.parent.is_dir()
        name = str(args.steer_out)
        require(folder, "--steer-out", name, "in a folder that exists")
        new = not args.steer_out.exists()
        require(new, "--steer-out", name, "another file: this one exists")
    if args.risk_difference is None:
        every = (*markers, *against)
        counts = marking.read_counts(args.trace, every, args.start)
        weights = [1.0] * len(markers) + [-1.0] * len(against)
        score = marking.marker_scores(counts, every, weights, share)
        steering = marking.scaled(score, args.top, args.scale)
        what, chosen = "nPMI", best(score, args.top)
    else:
        if markers or against or share is not None:
            raise ConfigError("--risk-difference: give it without markers.")
        files = (args.trace, args.risk_difference)
        pair = [marking.read_counts(file, (), args.start) for file in files]
        score = marking.risk_scores(*pair)
        steering = marking.switched(score, args.top)
        size = {layer: abs(score_E) for layer, score_E in score.items()}
        what, chosen = "risk difference", best(size, args.top)
    rows = [{"layer": n, "expert": e, what: float(score[n][e])} for n, e, _ in chosen]
    if args.steer_out is not None:
        how = {
            "score": what,
            "trace": str(args.trace),
            "markers": list(map(str, markers)),
            "against": list(map(str, against)),
            "experts": rows,
        }
        if args.risk_difference is not None:
            how["without"] = str(args.risk_difference)
        dataclasses.replace(steering, how=how).save(args.steer_out)
    if args.json:
        print(dump_json({"experts": rows}))
        return
    for row in rows:
        print(f"layer {row['layer']}, expert {row['expert']}: {what} {row[what]:.3f}")
    if args.steer_out is not None:
        print(f"{args.steer_out}: for moex generate --steer, moex eval --steer")
