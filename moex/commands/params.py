"""`moex params`."""

import json

from moex.commands import Verb
from moex.commands.arguments import add_json
from moex.config.base import ConfigError

EXAMPLES = """
Examples:
  moex params --config=moe_8x7b
  moex params --config=quickstart --like=quickstart:ffn=dense \\
    --match=flops
"""


class Command(Verb):
    """Print what a model costs, layer by layer.

    It lists parameters, FLOPs, and bytes of weights, gradients, optimizer state and of
    what the backward pass needs. No data is read and no array is made.
    """

    examples = EXAMPLES

    def add(self, parser):
        add_json(parser)
        parser.add_argument(
            "--like",
            metavar="FILE[:arg]",
            help="find hidden widths that give --config the cost of this config "
            "instead",
        )
        parser.add_argument(
            "--match",
            choices=("params", "active", "flops"),
            help="the cost that --like is about: all parameters, those that a token "
            "uses, or FLOPs per trained token",
        )

    def run(self, args, config_args):
        from moex.costs import table
        from moex.runs.directory import given_config

        cfg = given_config(config_args)
        if (args.like is None) != (args.match is None):
            raise ConfigError("--like and --match go together; give both.")
        if args.like is not None:
            like = given_config([f"--config={args.like}"])
            result = table.matched(cfg, like, args.match)
            print(json.dumps(result) if args.json else table.match_lines(result))
            return
        rows = table.model_rows(cfg)
        if args.json:
            print(json.dumps(table.rows_dict(cfg, rows)))
        else:
            print(table.rows_table(cfg, rows))
