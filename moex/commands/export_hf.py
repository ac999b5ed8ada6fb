"""`moex export-hf`; see docs/interop.md."""

from moex.commands import Verb
from moex.commands.arguments import add_run
from moex.commands.import_hf import EXAMPLES
from moex.config.arguments import path


class Command(Verb):
    """Write a run as a folder that transformers loads.

    An imported run is exported as its family, any other run as the closest family. If
    there is none, the error names the difference.
    """

    examples = EXAMPLES
    refuses_config = "takes the config of the run"

    def add(self, parser):
        add_run(parser)
        parser.add_argument("--out", type=path, required=True, help="the new folder")
        parser.add_argument(
            "--dtype",
            help="float32, bfloat16 or float16; default: as imported, else float32",
        )

    def run(self, args, config_args):
        from moex.interop.export import export_hf

        export_hf(args.run, args.out, dtype=args.dtype)
