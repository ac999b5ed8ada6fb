"""`moex data`; see docs/data.md."""

from moex.commands import Verb
from moex.config.arguments import integer


class Command(Verb):
    """Prepare the data of a config, or look at it."""

    left = "sources that were prepared are kept, and the others are prepared next time"

    def add(self, parser):
        parser.add_argument("action", choices=("prepare", "inspect"))
        parser.add_argument(
            "--example", type=integer, default=0, help="which training sequence to show"
        )

    def run(self, args, config_args):
        from moex.data.report import inspect
        from moex.runs.directory import given_config
        from moex.runs.keys import check_run
        from moex.tasks.base import require_token_ids

        cfg = given_config(config_args)
        check_run(cfg)
        if args.action == "inspect":
            require_token_ids(cfg, "moex data inspect")
        prepared = cfg.task.prepare(cfg)
        if args.action == "inspect":
            print(inspect(prepared, example=args.example))
            return
        for name, train, held_out in zip(
            prepared.domains, prepared.train, prepared.eval, strict=True
        ):
            sizes = f"{len(train):,} to train on, {len(held_out):,} held out"
            print(f"data: {name} is prepared: sequences: {sizes}")
