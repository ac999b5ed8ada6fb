"""The arguments of every `moex` command; their help is the reference of the commands.

What starts with `--config` is not here: ml_collections reads it (`flags.py`).
"""

import argparse
import pathlib

from moex.config import ConfigError

CONFIG_HELP = """\
Configuration:
  --config=FILE[:arg]     a Python file with get_config(arg), such as
                          configs/quickstart.py
  --config.a.b=value      override one field; layers and patterns are indexed:
                          --config.model.layers[0].pattern[0].router.k=4
                          `moex config --config=FILE` lists all fields
"""

TRAIN_EXAMPLES = """
Examples:
  moex train --config=configs/quickstart.py --workdir=runs/first
  moex train --config=configs/quickstart.py --workdir=runs/lr --config.optim.lr=0.01
  moex train --config=configs/moe_1b.py --dry-run

The same command on the same --workdir goes on where the run stopped. SIGTERM saves a
checkpoint and exits.
"""

PARAMS_EXAMPLES = """
Examples:
  moex params --config=configs/moe_8x7b.py
  moex params --config=configs/quickstart.py --like=configs/quickstart.py:ffn=dense \\
    --match=flops
"""

PLAN_EXAMPLES = """
Examples:
  moex plan --config=configs/moe_8x7b.py --topology=v5p:4x4x4
  moex plan --config=configs/moe_1b.py --topology=h100:8 --config.remat=dots
  moex plan --config=configs/quickstart.py --topology=v5e:1x1 --compile
"""


class Parser(argparse.ArgumentParser):
    """Reports a mistake as one line, like every other mistake."""

    def error(self, message):
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def make_parser() -> argparse.ArgumentParser:
    """The argument parser; its help is the reference of the commands."""
    parser = Parser(
        prog="moex",
        description="Train, score and sample mixture-of-experts language models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, epilog=CONFIG_HELP, usage=""):
        return commands.add_parser(
            name,
            usage=f"moex {name} {usage}" if usage else None,
            help=text[0].lower() + text[1:].split(".")[0],
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    train = command(
        "train",
        "Train a model, or continue the run in --workdir.",
        CONFIG_HELP + TRAIN_EXAMPLES,
        "--config=FILE[:arg] --workdir=RUN [--config.a.b=value ...] [options]",
    )
    train.add_argument(
        "--workdir", type=pathlib.Path, help="run directory: config, logs, checkpoints"
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and the data, print the model table and stop",
    )
    _add_many(train)
    config = command("config", "Print a resolved config, one field a line.")
    config.add_argument("--json", action="store_true", help="as JSON with type tags")
    _add_params(command)
    _add_plan(command)
    evaluate = command(
        "eval",
        "Score held-out data with the newest checkpoint of a run. Without --config the "
        "run's own data is used; --config.data... changes it.",
    )
    evaluate.add_argument("run", type=pathlib.Path, help="run directory")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument(
        "--sequences", type=_positive, help="score at most this many sequences"
    )
    _add_generate(command)
    _add_convert(command)
    data = command("data", "Prepare the data of a config, or look at it.")
    data.add_argument("action", choices=("prepare", "inspect"))
    data.add_argument(
        "--example", type=int, default=0, help="which training sequence to show"
    )
    return parser


def _add_many(train):
    many = train.add_argument_group(
        "several processes (one per host, or one per GPU)",
        "Open MPI, Slurm's srun and TPU pods on GKE are found in the environment.",
    )
    many.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="ask TPU metadata and Kubernetes too; --no-distributed joins nobody",
    )
    many.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, to join explicitly"
    )
    many.add_argument("--num-processes", type=_positive, metavar="N")
    many.add_argument("--process-id", type=int, metavar="I", help="0 to N-1")
    many.add_argument(
        "--join-timeout",
        type=_positive,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the other processes (300)",
    )
    many.add_argument(
        "--heartbeat-timeout",
        type=_positive,
        default=100,
        metavar="SECONDS",
        help="a host that is silent for so long ends the job (100)",
    )


def _add_params(command):
    params = command(
        "params",
        "Print what a model costs, layer by layer. Parameters, FLOPs, and bytes of "
        "weights, gradients, optimizer state and of what the backward pass needs; no "
        "data is read and no array is made.",
        CONFIG_HELP + PARAMS_EXAMPLES,
    )
    params.add_argument("--json", action="store_true", help="print JSON")
    params.add_argument(
        "--like",
        metavar="FILE[:arg]",
        help="find hidden widths that give --config the cost of this config instead",
    )
    params.add_argument(
        "--match",
        choices=("params", "active", "flops"),
        help="the cost that --like is about: all parameters, those that a token uses, "
        "or FLOPs per trained token",
    )


def _add_plan(command):
    plan = command(
        "plan",
        "Say what a job needs of devices that need not be there. Memory of a device, "
        "bytes that each mesh axis carries and the time that takes, time of a step, "
        "and what to change if it does not fit; no data is read and no array is made.",
        CONFIG_HELP + PLAN_EXAMPLES,
    )
    plan.add_argument(
        "--topology",
        metavar="NAME",
        help="v5p:4x4x4 or v5e:16x16 (TPU chips), v5e:16x16*2 (two slices), h100:8x4 "
        "(4 nodes of 8 GPUs), cpu:8; devices: v4 v5e v5p v6e a100 h100 h200 cpu",
    )
    plan.add_argument(
        "--compile",
        action="store_true",
        help="compile the train step for it too, with libtpu (extra `aot`)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_generate(command):
    generate = command(
        "generate", "Write text with the newest checkpoint of a run.", ""
    )
    generate.add_argument("run", type=pathlib.Path, help="run directory")
    generate.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; repeat it for a batch; default: standard input",
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=128)
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token"
    )
    generate.add_argument(
        "--top-k", type=int, default=0, help="sample from the k likeliest; 0: all"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="sample from this share of probability"
    )
    generate.add_argument("--seed", type=int, default=0)


def _add_convert(command):
    convert = command(
        "convert",
        "Write a run with other experts. latent: the experts of every MoE layer become "
        "small factors behind projections that groups of experts share. The new run "
        "starts at step 0 and can be scored, sampled and trained on.",
        "",
    )
    convert.add_argument("run", type=pathlib.Path, help="run directory")
    convert.add_argument("--to", choices=("latent",), required=True)
    convert.add_argument(
        "--workdir", type=pathlib.Path, required=True, help="the new run directory"
    )
    convert.add_argument(
        "--group", type=_positive, required=True, help="experts that share a projection"
    )
    convert.add_argument(
        "--latent", type=_positive, help="width of the projections; default: of experts"
    )
    convert.add_argument(
        "--ops", default="gate,up", help="which of gate,up,down; default: gate,up"
    )
    convert.add_argument(
        "--rank", type=_positive, help="cut every expert to this rank first"
    )
    convert.add_argument(
        "--refit",
        action="store_true",
        help="own factors from the uncut experts",
    )
    convert.add_argument(
        "--whiten",
        action="store_true",
        help="keep what matters on training data, not for inputs of all directions",
    )
    convert.add_argument(
        "--calibration",
        type=_positive,
        metavar="SEQUENCES",
        help="training sequences that --whiten looks at; default: 256",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
