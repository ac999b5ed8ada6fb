"""`moex convert`; see docs/convert.md."""

from moex.commands import Verb
from moex.commands.arguments import add_run, train_on
from moex.config.arguments import path
from moex.convert.base import asked_for, kinds, option


class Command(Verb):
    """Write a run with other layers."""

    examples = """
    Examples:
      moex convert runs/dense --to=moe --experts=8 --k=2 --workdir=runs/moe
      moex convert runs/dense --to=moe --experts=8 --k=1 --split=4 --layers=every:2 \\
        --workdir=runs/fine
      moex convert runs/moe --to=latent --group=8 --latent=64 --workdir=runs/latent
      moex convert runs/moe --to=merged --groups=4 --workdir=runs/half
      moex convert runs/moe --to=merged --groups=4 --write-plan=plan.json
      moex convert runs/moe --to=merged --plan=plan.json --workdir=runs/half
      moex convert runs/moe --to=pruned --keep=4 --score=reap --workdir=runs/half
      moex convert runs/mixed --to=subset --keep=4 --write-store=store.json
      moex convert runs/mixed --to=subset --store=store.json --task=code \\
        --workdir=runs/code
      moex convert runs/lora --to=folded --workdir=runs/folded
    """
    refuses_config = "takes the config of the run"

    def description(self):
        simple_first = sorted(kinds().values(), key=lambda kind: len(kind.may_follow))
        each = " ".join(f"{kind.kind}: {kind.about}." for kind in simple_first)
        end = "The new run starts at step 0 and can be scored, sampled and trained on."
        return f"{super().description()} {each} {end}"

    def add(self, parser):
        add_run(parser)
        to = parser.add_mutually_exclusive_group(required=True)
        to.add_argument("--to", choices=tuple(kinds()))
        to.add_argument(
            "--merge-adapter",
            dest="to",
            action="store_const",
            const="folded",
            help="the same as --to=folded",
        )
        target = parser.add_mutually_exclusive_group(required=True)
        target.add_argument("--workdir", type=path, help="the new run directory")
        target.add_argument(
            "--write-plan",
            type=path,
            metavar="FILE",
            help="write the plan of the conversion, to read and edit; convert nothing",
        )
        target.add_argument(
            "--write-store",
            type=path,
            metavar="FILE",
            help="write a store of patterns, with --to=subset --keep; convert nothing",
        )
        owners: dict[str, list[str]] = {}
        for name, kind in kinds().items():
            for flag in kind.flags:
                owners.setdefault(flag, []).append(name)
        groups = {}
        for flag, names in sorted(owners.items(), key=lambda own: len(own[1])):
            title = f"to {' and '.join(names)}"
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            how = kinds()[names[0]].flags[flag]
            groups[title].add_argument(option(flag), **({"default": None} | how))

    def output(self, args):
        return args.workdir or args.write_plan or args.write_store

    def run(self, args, config_args):
        from moex.analysis.writer import check_new
        from moex.convert.apply import convert_run, plan_run, report_text, store_run

        conversions = asked_for(args.to, vars(args))
        if args.write_plan is not None:
            check_new(args.write_plan, "--write-plan")
            plan = plan_run(args.run, conversions)
            plan.save(args.write_plan)
            print(f"{args.write_plan}: a plan for {len(plan.layers)} layers")
            return
        if args.write_store is not None:
            check_new(args.write_store, "--write-store")
            store = store_run(args.run, conversions)
            store.save(args.write_store)
            tasks = ", ".join(own.task for own in store.patterns)
            print(f"{args.write_store}: a store of the tasks {tasks}")
            return
        report = convert_run(args.run, args.workdir, conversions)
        print(report_text(report, conversions))
        print(f"go on training: {train_on(args.workdir)}")
