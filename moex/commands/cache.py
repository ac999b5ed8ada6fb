"""`moex cache`; see moex/cache.py."""

import datetime
import json

from moex.commands import Verb
from moex.commands.arguments import add_json
from moex.config.arguments import integer
from moex.config.base import ConfigError

EXAMPLES = """
Examples:
  moex cache
  moex cache --clear=programs
  moex cache --clear=all --older-than=30
"""


class Command(Verb):
    """List what is kept between commands, or remove it.

    Prepared data, compiled programs, the C library of the CPU kernels and experts of
    offloaded runs are kept in $MOEX_CACHE, or ~/.cache/moex. What is missing is made
    again when it is needed.
    """

    examples = EXAMPLES
    refuses_config = "takes no config"
    left = "what was removed by then stays removed"

    def add(self, parser):
        add_json(parser)
        parser.add_argument(
            "--clear",
            choices=("data", "programs", "kernels", "banks", "all"),
            help="remove this kind; while no other command of moex runs",
        )
        parser.add_argument(
            "--older-than",
            type=integer,
            metavar="DAYS",
            help="remove only what was not used for this number of days",
        )

    def run(self, args, config_args):
        from moex import cache

        if args.older_than is not None and args.clear is None:
            raise ConfigError("--older-than: is for --clear; give both.")
        if args.older_than is not None and args.older_than < 0:
            raise ConfigError(f"--older-than = {args.older_than}: must be >= 0.")
        kinds = [*cache.KINDS] if args.clear in (None, "all") else [args.clear]
        if args.clear is None:
            found = list(cache.entries())
        else:
            found = cache.clear(kinds, args.older_than or 0)
        if args.json:
            rows = [{**e._asdict(), "path": str(e.path)} for e in found]
            print(json.dumps({"removed": args.clear is not None, "entries": rows}))
            return
        for kind in kinds:
            of_kind = [e for e in found if e.kind == kind]
            size = sum(e.bytes for e in of_kind) / 1e6
            line = f"{kind:<9} {len(of_kind):>5} entries {size:>10.1f} MB"
            if of_kind:
                last = datetime.date.fromtimestamp(max(e.used for e in of_kind))
                line += f"  last used {last}  {of_kind[0].path.parent}"
            print(("removed " if args.clear else "") + line)
            if args.clear is None:
                print(f"          {cache.KINDS[kind]}")
