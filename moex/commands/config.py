"""`moex config`."""

import json

from moex.commands import Verb


class Command(Verb):
    """Print a resolved config, one field a line."""

    def add(self, parser):
        parser.add_argument(
            "--json", action="store_true", help="as JSON with type tags"
        )

    def run(self, args, config_args):
        from moex.config.base import describe, to_dict
        from moex.runs.directory import given_config

        cfg = given_config(config_args)
        print(json.dumps(to_dict(cfg), indent=1) if args.json else describe(cfg))
