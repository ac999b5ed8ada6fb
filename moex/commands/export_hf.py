"""`moex export-hf`; see docs/interop.md."""

from moex.commands import Verb
from moex.commands.arguments import add_run
from moex.commands.import_hf import EXAMPLES
from moex.config.arguments import path
from moex.config.base import ConfigError


class Command(Verb):
    """Write a run as a folder that transformers loads, or its adapters for PEFT.

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

        parser.add_argument(
            "--adapter",
            action="store_true",
            help="write the adapters of the run without its base: LoRA as PEFT does, "
            "other kinds in moex's own layout (docs/adapters.md)",
        )

    def run(self, args, config_args):
        if args.adapter:
            from moex.interop.adapter import export_adapter

            if args.dtype is not None:
                raise ConfigError("--dtype: adapters leave in the types they have.")
            export_adapter(args.run, args.out)
            return
        from moex.interop.export import export_hf

        export_hf(args.run, args.out, dtype=args.dtype)
