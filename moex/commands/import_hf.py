"""`moex import-hf`; see docs/interop.md."""

from moex.commands import Verb
from moex.commands.arguments import train_on
from moex.config.arguments import path

EXAMPLES = """
Examples:
  moex import-hf models/OLMoE-1B-7B --out runs/olmoe
  moex train --workdir=runs/olmoe --data=chats.jsonl
  moex export-hf runs/olmoe --out models/OLMoE-tuned
"""


class Command(Verb):
    """Make a run from a Hugging Face checkpoint folder.

    The folder holds a config and safetensors. The run starts at step 0 and can be
    scored, sampled and trained on. --config.a.b=value changes its run config, such as
    --config.mesh.fsdp=8.
    """

    usage = "FOLDER --out RUN [options]"

    def epilog(self):
        return EXAMPLES  # without the help on config files: only some fields can change

    def add(self, parser):
        parser.add_argument("folder", type=path, help="the checkpoint folder")
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

    def run(self, args, config_args):
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
