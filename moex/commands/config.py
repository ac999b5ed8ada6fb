"""`moex config`."""

import json
import textwrap

from moex.commands import Verb


class Command(Verb):
    """Print a resolved config, one field a line."""

    examples = """
    Examples:
      moex config --list
      moex config --config=quickstart
      moex config --config=quickstart:router=topp --json
    """

    def add(self, parser):
        form = parser.add_mutually_exclusive_group()
        form.add_argument(
            "--list",
            action="store_true",
            help="the configs that come with moex instead, one line for each",
        )
        form.add_argument("--json", action="store_true", help="as JSON with type tags")

    def run(self, args, config_args):
        from moex.config import shipped
        from moex.config.base import ConfigError, describe, to_dict
        from moex.runs.directory import given_config

        if args.list:
            if config_args:
                raise ConfigError(f"--list: takes no {config_args[0]}.")
            for name, file in shipped.shipped().items():
                text = f"{name:14s}{shipped.about(file)}"
                print(textwrap.fill(text, 80, subsequent_indent=" " * 14))
            print(f"Their files, to be read or copied: {shipped.FOLDER}")
            return
        cfg = given_config(config_args)
        print(json.dumps(to_dict(cfg), indent=1) if args.json else describe(cfg))
