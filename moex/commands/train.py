"""`moex train`: one run, or with `--sweep` a grid of them."""

from moex.cluster import distributed
from moex.cluster.flags import add_processes, process_flags
from moex.commands import Verb
from moex.commands.arguments import add_data
from moex.config.arguments import integer, path
from moex.config.base import ConfigError

EXAMPLES = """
Examples:
  moex train --config=quickstart --workdir=runs/first
  moex train --config=quickstart --workdir=runs/lr --config.optim.lr=0.01
  moex train --config=quickstart --workdir=runs/own --data=book.txt
  moex train --config=quickstart --dry-run

The same command on the same --workdir goes on where the run stopped, and so does
`moex train --workdir=RUN` alone. SIGTERM or Ctrl-C saves a checkpoint and exits.

A sweep is one run per combination of values, each in a folder of --workdir:
  moex train --config=quickstart --workdir=runs/sweep \\
    --sweep optim.lr=0.01,0.02 --sweep config:router=topk,topp
"""


class Command(Verb):
    """Train a model, or continue the run in --workdir."""

    talks = True
    examples = EXAMPLES
    usage = "--config=FILE[:arg] --workdir=RUN [--config.a.b=value ...] [options]"

    def add(self, parser):
        parser.add_argument(
            "--workdir", type=path, help="run directory: config, logs, checkpoints"
        )
        add_data(parser, "in place of the data of the config, train on this")
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="check the config and the data, print the model table and stop; of a "
            "sweep: check all configs and list them",
        )
        sweep = parser.add_argument_group("several runs over a grid, one after another")
        sweep.add_argument(
            "--sweep",
            action="append",
            metavar="FIELD=V1,V2",
            help="values of a field of the config, seed included; repeat it for a "
            "grid. config:KEY=V1,V2 are values of a key of the config's argument, "
            "and config=FILE|FILE are whole configs. The same command skips what is "
            "finished",
        )
        sweep.add_argument(
            "--sweep-index",
            type=integer,
            metavar="I",
            help="train one run of the grid; --dry-run lists them",
        )
        parser.add_argument(
            "--profile",
            metavar="START:STOP",
            help="trace steps START to STOP - 1 (the first is 0) into RUN/profile",
        )
        add_processes(parser)

    def run(self, args, config_args):
        from moex.runs import sweep
        from moex.runs.given import trained_config
        from moex.train.training import train

        if args.workdir is None and not args.dry_run:
            raise ConfigError("--workdir: missing; give a folder, such as runs/first.")
        if args.sweep:
            if args.profile is not None:
                raise ConfigError("--profile: is for one run, not for a --sweep.")
            sweep.run(
                args.sweep,
                config_args,
                args.workdir,
                index=args.sweep_index,
                dry_run=args.dry_run,
                flags=[*process_flags(args), *(f"--data={p}" for p in args.data or ())],
                say=distributed.print_once(args),
                load=lambda own: trained_config(args, own),
            )
            return
        if args.sweep_index is not None:
            raise ConfigError("--sweep-index: is for --sweep; give both.")
        cfg = trained_config(args, config_args, distributed.print_once(args))
        distributed.join(args, distributed.told(cfg, args))
        made = train(cfg, args.workdir, dry_run=args.dry_run, profile=args.profile)
        distributed.leave()
        if made.get("interrupted"):
            raise SystemExit(130)
