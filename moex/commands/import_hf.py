"""`moex import-hf`; see docs/interop.md."""

from moex.commands import Verb
from moex.commands.arguments import train_on
from moex.config.arguments import path
from moex.config.base import ConfigError
from moex.convert.base import option

EXAMPLES = """
Examples:
  moex import-hf models/OLMoE-1B-7B --out runs/olmoe
  moex train --workdir=runs/olmoe --data=chats.jsonl
  moex export-hf runs/olmoe --out models/OLMoE-tuned
  moex export-hf runs/lora --adapter --out models/OLMoE-lora
  moex import-hf runs/olmoe --adapter=models/OLMoE-lora --out runs/lora2
"""


class Command(Verb):
    """Make a run from a Hugging Face checkpoint folder, or from an adapter for a run.

    The folder holds a config and safetensors. The run starts at step 0 and can be
    scored, sampled and trained on. --config.a.b=value changes its run config, such as
    --config.mesh.fsdp=8.
    """

    usage = "FOLDER --out RUN [options]"

    def epilog(self):
        return EXAMPLES  # without the help on config files: only some fields can change

    def add(self, parser):
        parser.add_argument(
            "folder",
            type=path,
            help="the checkpoint folder; with --adapter the run that is its base",
        )
        parser.add_argument(
            "--out", type=path, required=True, help="the new run directory"
        )
        parser.add_argument(
            "--tokenizer", type=path, help="file in place of its tokenizer.json"
        )
        parser.add_argument(
            "--doc-token",
            help="token between documents; default: its end-of-text token",
        )

        parser.add_argument(
            "--adapter",
            type=path,
            metavar="FOLDER",
            help="make a run of this adapter, of PEFT or of export-hf --adapter",
        )

    def run(self, args, config_args):
        if args.adapter is not None:
            from moex.interop.adapter import import_adapter

            for flag in ("tokenizer", "doc_token"):
                if vars(args)[flag] is not None:
                    told = f"{option(flag)}: an adapter has the tokenizer of its base."
                    raise ConfigError(told)
            import_adapter(args.folder, args.adapter, args.out, config_args)
        else:
            from moex.interop.hf import import_hf

            import_hf(
                args.folder,
                args.out,
                config_args,
                tokenizer=args.tokenizer,
                doc_token=args.doc_token,
            )
        out = args.out.expanduser()
        print(f"go on training: {train_on(out)}")
