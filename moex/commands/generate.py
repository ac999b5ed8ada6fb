"""`moex generate`."""

import sys

from moex import progress
from moex.commands import Verb
from moex.commands.arguments import add_run, add_steer, steering_of
from moex.config.arguments import integer, positive
from moex.config.base import require
from moex.serve.flags import add_offload, add_parts, add_weights, offload_of


class Command(Verb):
    """Write text with the newest checkpoint of a run."""

    refuses_config = "takes the config of the run"

    def add(self, parser):
        add_run(parser)
        parser.add_argument(
            "--prompt",
            action="append",
            metavar="TEXT",
            help="text to continue; repeat it for a batch; default: standard input",
        )
        parser.add_argument(
            "--chat",
            action="store_true",
            help="a prompt is a user's message, laid out by the chat template of the "
            "data or of the imported model; print the answer alone",
        )
        add_parts(parser)
        add_steer(parser)
        add_weights(parser)
        parser.add_argument(
            "--visual",
            metavar="FILE.npy",
            help="visual tokens for a model with AdapterV2(visual=...): numbers "
            "[tokens, width], or [prompts, tokens, width]",
        )
        add = parser.add_argument
        add("--max-new-tokens", type=positive, default=128)
        add("--temperature", type=float, default=0.8, help="0: the likeliest token")
        add("--top-k", type=integer, default=0, help="sample from so many; 0: all")
        add("--top-p", type=float, default=1.0, help="sample from this share of chance")
        add("--seed", type=integer, default=0)
        add_offload(parser)

    def run(self, args, config_args):
        from moex.data.files import decode_utf8
        from moex.serve.text import write_text

        require(0 <= args.seed < 2**31, "--seed", args.seed, "in [0, 2**31)")
        prompts = args.prompt
        if not prompts:
            progress.clear(pause=True)  # somebody may be typing
            given = sys.stdin.buffer.read()
            progress.clear()
            prompts = [decode_utf8(given, "standard input", "--prompt")]
        texts = write_text(
            args.run,
            prompts,
            chat=args.chat,
            adapter=args.adapter,
            use=args.use,
            steering=steering_of(args),
            experts=args.experts,
            offload=offload_of(args),
            weights=args.weights,
            visual=args.visual,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
        print("\n--------\n".join(texts))
