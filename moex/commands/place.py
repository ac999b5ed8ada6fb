"""`moex place`; see docs/placement.md."""

from moex.commands import Verb
from moex.commands.arguments import add_json, run_dir
from moex.config.arguments import path
from moex.json_files import dump_json
from moex.offload import flags as offloading
from moex.placement.flags import add_placement, every_of, how_of, objective_of


class Command(Verb):
    """Place experts on devices, so that few tokens change devices between layers.

    It reads a trace, or the sums beside it, and prints how many tokens change devices
    as the model is, placed, on text that is held out, and where routing has no affinity
    between layers. --out writes the plan for `moex convert --to=placed`; --plan scores
    an old plan on this trace (docs/placement.md). --simulate replays the trace with few
    resident experts instead (docs/offload.md).
    """

    examples = """
    Examples:
      moex place trace.parquet --devices=8 --nodes=2 --out=place.json
      moex convert runs/moe --to=placed --plan=place.json --workdir=runs/placed
      moex place later.parquet --plan=place.json
      moex place trace.parquet --simulate --slots=4,8,50% --policy=lru,mrs,belady
    """
    refuses_config = "takes a trace and no config"

    def add(self, parser):
        parser.add_argument(
            "trace", type=path, help="file of `moex trace`, or its sums (.npz)"
        )
        add_placement(parser)
        parser.add_argument(
            "--run",
            type=run_dir,
            metavar="RUN",
            help="the run of the trace: groups of its routers stay whole, and experts "
            "that share weights are placed together",
        )
        add_json(parser)
        offloading.add_simulate(parser)

    def output(self, args):
        return args.out or offloading.output(args)

    def run(self, args, config_args):
        if (asked := offloading.asked_for(args)) is not None:
            offloading.run(args, asked)
            return
        from moex.analysis.writer import check_new
        from moex.convert.plans import Plan
        from moex.placement import report
        from moex.placement.plan import Facts, make_plan

        if args.out is not None:
            check_new(args.out)
        plan = None if args.plan is None else Plan.read(args.plan, "place")
        how = how_of(args, plan)
        text = report.Text.read(
            args.trace,
            objective=objective_of(args, plan),
            every=every_of(args),
            held_out=args.held_out,
            facts=None if args.run is None else Facts.of(args.run),
        )
        if plan is not None:
            found = report.drift(text, plan, how)
        else:
            how.check(text.own.layers)
            if args.replicas is not None:
                report.check_replicas(text, how, args.replicas)
            found, placed = report.report(text, how)
            if args.out is not None:
                made = {k: v for k, v in found.items() if k not in ("run", "step")}
                made |= {"method": how.method, "slack": how.slack, "seed": how.seed}
                make_plan(placed, text.own, made).save(args.out)
        if args.replicas is not None:
            found["replicas"] = report.replicas(text, how, args.replicas)
        if args.json:
            print(dump_json(found))
            return
        print("\n".join(report.lines(found)))
        if args.replicas is not None:
            print("\n".join(report.replica_lines(found["replicas"])))
        if args.out is not None:
            print(f"{args.out}: a plan for {found['layers']} layers")
