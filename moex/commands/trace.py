"""`moex trace`; its file is described in docs/traces.md."""

from moex.analysis.flags import add_sums, check_sums, recorded_of
from moex.commands import Verb
from moex.commands.arguments import (
    add_data,
    add_run,
    add_steer,
    scored_config,
    steering_of,
)
from moex.config.arguments import integer, path, positive


class Command(Verb):
    """Write to which experts a run sends the tokens of held-out data.

    The Parquet file has one row per token and MoE layer (docs/traces.md): experts,
    gates, logits. --sums adds up what merging, pruning and steering need to know, in a
    small file. Without --config the run's own data is used; --config.data... changes
    it, --data replaces it.
    """

    examples = """
    Examples:
      moex trace runs/first --out first.parquet
      moex trace runs/first --out step500.parquet --step=500 --tokens=100000
      moex trace runs/olmoe --out t.parquet --data=web.txt --data='code/*.py'
      moex trace runs/olmoe --out sums.npz --sums-only --by-domain --data=web.txt
    """

    def add(self, parser):
        add_run(parser)
        parser.add_argument(
            "--out", type=path, required=True, help="the file; must not exist"
        )
        add_data(parser, "trace all of this")
        parser.add_argument(
            "--tokens", type=positive, help="at most this many tokens; default: all"
        )
        parser.add_argument(
            "--step", type=integer, help="of the checkpoint; default: the newest"
        )
        parser.add_argument(
            "--logits",
            action="store_true",
            help="also the router logits of the experts that were not chosen",
        )
        add_steer(parser)
        add_sums(parser)

    def run(self, args, config_args):
        check_sums(args)
        cfg = scored_config(args, config_args)
        how = {"tokens": args.tokens, "step": args.step, "logits": args.logits}
        how |= {"steering": steering_of(args)}
        if args.sums or args.sums_only:
            from moex.analysis.record_sums import trace_with_sums

            recorded = recorded_of(args)
            options = {"trace": args.sums, "recorded": recorded}
            made, file, sums = trace_with_sums(
                args.run, cfg, args.out, **options, **how
            )
            print(
                f"{file}: sums of {sums.tokens:,} tokens, {len(sums.layers)} routers, "
                f"{file.stat().st_size / 1e6:.1f} MB"
            )
        else:
            from moex.analysis.record import trace_run

            made = trace_run(args.run, cfg, args.out, **how)
        if made is not None:
            print(
                f"{args.out}: {args.run} at step {made['step']}, {made['tokens']:,} "
                f"tokens, {made['layers']} routers, {made['bytes'] / 1e6:.1f} MB"
            )
