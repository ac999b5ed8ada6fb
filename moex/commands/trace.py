"""`moex trace`; its file is described in docs/traces.md."""

from moex.commands import Verb
from moex.commands.arguments import (
    add_data,
    add_markers,
    add_run,
    add_steer,
    markers_of,
    scored_config,
    steering_of,
)
from moex.config.arguments import integer, path, positive
from moex.config.base import ConfigError


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
        sums = parser.add_argument_group("sums (docs/traces.md)")
        only = sums.add_mutually_exclusive_group()
        only.add_argument(
            "--sums", action="store_true", help="write them too, to OUT.sums.npz"
        )
        only.add_argument(
            "--sums-only", action="store_true", help="write them to OUT, and no trace"
        )
        sums.add_argument(
            "--by-domain", action="store_true", help="also the sums of each domain"
        )
        sums.add_argument(
            "--pool",
            type=positive,
            metavar="N",
            help="experts of a token that TCESS and PEU look at, those of greatest "
            "logits; default: as many as it chose",
        )
        add_markers(sums, "marker", "count the experts at this token")

    def run(self, args, config_args):
        from moex.analysis.record import trace_run

        if args.sums or args.sums_only:
            made = self._sums(args, config_args)
        else:
            markers = args.marker or args.marker_span
            for name, given in (
                ("by_domain", args.by_domain),
                ("pool", args.pool),
                ("marker", markers),
            ):
                if given:
                    raise ConfigError(f"--{name.replace('_', '-')}: is for --sums.")
            made = trace_run(
                args.run,
                scored_config(args, config_args),
                args.out,
                tokens=args.tokens,
                step=args.step,
                logits=args.logits,
                steering=steering_of(args),
            )
        if made is None:
            return
        print(
            f"{args.out}: {args.run} at step {made['step']}, {made['tokens']:,} "
            f"tokens, {made['layers']} routers, {made['bytes'] / 1e6:.1f} MB"
        )

    def _sums(self, args, config_args) -> dict | None:
        """Write sums, and return what was traced, if anything."""
        from moex.analysis.record_sums import Recorded, trace_with_sums

        made, file, sums = trace_with_sums(
            args.run,
            scored_config(args, config_args),
            args.out,
            trace=args.sums,
            tokens=args.tokens,
            step=args.step,
            logits=args.logits,
            steering=steering_of(args),
            recorded=Recorded(
                markers=markers_of(args, "marker"),
                by_domain=args.by_domain,
                pool=args.pool,
            ),
        )
        size = file.stat().st_size
        print(
            f"{file}: sums of {sums.tokens:,} tokens, {len(sums.layers)} routers, "
            f"{size / 1e6:.1f} MB"
        )
        return made
