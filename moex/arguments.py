"""The arguments of every `moex` command; their help is the reference of the commands.

What starts with `--config` is not here: ml_collections reads it (`flags.py`).
"""

import argparse
import math
import pathlib

from moex.config.base import LARGEST, ConfigError, short

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
  moex train --config=configs/quickstart.py --dry-run

The same command on the same --workdir goes on where the run stopped. SIGTERM or Ctrl-C
saves a checkpoint and exits.

A sweep is one run per combination of values, each in a folder of --workdir:
  moex train --config=configs/quickstart.py --workdir=runs/sweep \\
    --sweep optim.lr=0.01,0.02 --sweep seed=0,1,2
"""

COMPARE_EXAMPLES = """
Examples:
  moex compare runs/quickstart runs/k4 --out=k4.html
  moex compare runs/sweep/*/ --json
  moex compare runs/first runs/again --assert-equal=1e-6
"""

REPORT_EXAMPLES = """
Examples:
  moex report runs/quickstart
  moex report runs/quickstart --trace=trace.parquet --out=quickstart.html
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

TRACE_EXAMPLES = """
Examples:
  moex trace runs/first --out first.parquet
  moex trace runs/first --out step500.parquet --step=500 --tokens=100000
  moex trace runs/olmoe --out t.parquet --data=web.txt --data='code/*.py'
"""

EVAL_EXAMPLES = """
Examples:
  moex eval runs/first
  moex eval runs/first --data=web.txt --data='code/*.py'
"""

CONVERT_EXAMPLES = """
Examples:
  moex convert runs/dense --to=moe --experts=8 --k=2 --workdir=runs/moe
  moex convert runs/dense --to=moe --experts=8 --k=1 --split=4 --layers=every:2 \\
    --workdir=runs/fine
  moex convert runs/moe --to=latent --group=8 --latent=64 --workdir=runs/latent
"""

INTEROP_EXAMPLES = """
Examples:
  moex import-hf models/OLMoE-1B-7B --out runs/olmoe
  moex train --config=runs/olmoe/config.py --workdir=runs/olmoe --config.data=...
  moex export-hf runs/olmoe --out models/OLMoE-tuned
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
        made = commands.add_parser(
            name,
            usage=f"moex {name} {usage}" if usage else None,
            help=text[0].lower() + text[1:].split(".")[0],
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_project(made)
        return made

    train = command(
        "train",
        "Train a model, or continue the run in --workdir.",
        CONFIG_HELP + TRAIN_EXAMPLES,
        "--config=FILE[:arg] --workdir=RUN [--config.a.b=value ...] [options]",
    )
    train.add_argument(
        "--workdir", type=_path, help="run directory: config, logs, checkpoints"
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and the data, print the model table and stop; of a "
        "sweep: check all configs and list them",
    )
    _add_sweep(train)
    train.add_argument(
        "--profile",
        metavar="START:STOP",
        help="trace steps START to STOP - 1 (the first is 0) into RUN/profile",
    )
    _add_many(train)
    config = command("config", "Print a resolved config, one field a line.")
    config.add_argument("--json", action="store_true", help="as JSON with type tags")
    _add_params(command)
    _add_plan(command)
    _add_compare(command)
    _add_report(command)
    evaluate = command(
        "eval",
        "Score held-out data with the newest checkpoint of a run. Without --config the "
        "run's own data is used; --config.data... changes it, --data takes its place.",
        CONFIG_HELP + EVAL_EXAMPLES,
    )
    evaluate.add_argument("run", type=_path, help="run directory")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument(
        "--sequences", type=_positive, help="score at most this many sequences"
    )
    _add_data(evaluate)
    _add_tasks(evaluate)
    _add_generate(command)
    _add_trace(command)
    _add_analyse(command)
    _add_convert(command)
    _add_interop(command)
    data = command("data", "Prepare the data of a config, or look at it.")
    data.add_argument("action", choices=("prepare", "inspect"))
    data.add_argument(
        "--example", type=_integer, default=0, help="which training sequence to show"
    )
    return parser


def add_project(parser) -> None:
    """The flag of every command that names the folder of a user's own classes."""
    parser.add_argument(
        "--project",
        type=_folder,
        metavar="FOLDER",
        help="where config classes of your own are looked for; default: the folder of "
        "the config file, or the one you are in",
    )


def _add_sweep(train):
    sweep = train.add_argument_group("several runs over a grid, one after another")
    sweep.add_argument(
        "--sweep",
        action="append",
        metavar="FIELD=V1,V2",
        help="values of a field of the config, seed included; repeat it for a grid. "
        "The same command skips what is finished",
    )
    sweep.add_argument(
        "--sweep-index",
        type=_integer,
        metavar="I",
        help="train one run of the grid; --dry-run lists them",
    )


# Arguments of a process of several that take a value, and their defaults.
PLACE = {
    **dict.fromkeys(("coordinator", "num_processes", "process_id")),
    **{"join_timeout": 300, "heartbeat_timeout": 100},
}


def many_flags(args) -> list[str]:
    """The arguments of `_add_many` and `--project` again, for another command line."""
    values = {name: getattr(args, name) for name in PLACE}
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in values.items()
        if value != PLACE[name]
    ]
    if args.distributed is not None:
        flags.append("--distributed" if args.distributed else "--no-distributed")
    if args.project is not None:
        flags.append(f"--project={args.project}")
    return flags


def _add_many(train):
    many = train.add_argument_group(
        "several processes (one per host, or one per GPU)",
        "Open MPI, Slurm's srun and TPU pods on GKE are found in the environment.",
    )
    many.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="ask the TPU metadata server too; --no-distributed joins nobody",
    )
    many.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, to join explicitly"
    )
    many.add_argument("--num-processes", type=_positive, metavar="N")
    many.add_argument("--process-id", type=_integer, metavar="I", help="0 to N-1")
    many.add_argument(
        "--join-timeout",
        type=_positive,
        default=PLACE["join_timeout"],
        metavar="SECONDS",
        help="how long to wait for the other processes (300)",
    )
    many.add_argument(
        "--heartbeat-timeout",
        type=_positive,
        default=PLACE["heartbeat_timeout"],
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


def _add_compare(command):
    compare = command(
        "compare",
        "Put runs side by side: size, work, time and losses. Runs whose configs differ "
        "in the seed alone are one row, with 95 % intervals.",
        COMPARE_EXAMPLES,
        "RUN RUN ... [options]",
    )
    compare.add_argument("runs", nargs="+", type=_path, metavar="RUN")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument(
        "--out",
        type=_path,
        metavar="FILE",
        help="write a plot of loss against tokens, FLOPs and time (.html, .png), its "
        "points (.csv), or what --json prints (.json)",
    )
    compare.add_argument(
        "--assert-equal",
        nargs="?",
        type=_tolerance,
        const=(0.0, 0.0),
        metavar="RTOL[,ATOL]",
        help="fail at the first figure in which two runs differ, times apart: by more "
        "than RTOL of the larger value and more than ATOL (both 0)",
    )


def _add_report(command):
    report = command(
        "report",
        "Write a page about a run: warnings, curves, routing, config. One HTML file "
        "that needs no network; with a trace also what the experts specialise in.",
        REPORT_EXAMPLES,
        "RUN [--trace=FILE] [--compare-trace=FILE] [--out=FILE.html]",
    )
    report.add_argument("run", type=_path, help="run directory")
    report.add_argument("--trace", type=_path, metavar="FILE", help="of `moex trace`")
    report.add_argument(
        "--compare-trace",
        type=_path,
        metavar="FILE",
        help="trace of the same tokens with another checkpoint",
    )
    report.add_argument(
        "--token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="show the experts that go with this token; repeat it for several",
    )
    report.add_argument(
        "--out", type=_path, metavar="FILE", help="default: RUN/report.html"
    )


def _add_data(parser):
    parser.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help="all of this file (or folder, or glob) instead of held-out data; repeat "
        "it for several, each a domain. Text, .jsonl of prompt and response, .parquet "
        "and .arrayrecord of text",
    )


def _add_tasks(evaluate):
    tasks = evaluate.add_argument_group(
        "tasks of the lm_eval harness (extra `eval`)", "Instead of held-out data."
    )
    tasks.add_argument(
        "--tasks", metavar="A,B", help="YAML files or names, between commas"
    )
    tasks.add_argument(
        "--include-path", type=_path, metavar="FOLDER", help="of more tasks by name"
    )
    tasks.add_argument(
        "--limit", type=_positive, help="at most this many documents of a task"
    )
    tasks.add_argument(
        "--num-fewshot",
        type=_integer,
        metavar="N",
        help="examples before each question",
    )


def _add_generate(command):
    generate = command(
        "generate", "Write text with the newest checkpoint of a run.", ""
    )
    generate.add_argument("run", type=_path, help="run directory")
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
        "--top-k", type=_integer, default=0, help="sample from the k likeliest; 0: all"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="sample from this share of probability"
    )
    generate.add_argument("--seed", type=_integer, default=0)


def _add_trace(command):
    trace = command(
        "trace",
        "Write where a run sends the tokens of held-out data. One row per token and "
        "MoE layer in a Parquet file (docs/traces.md): experts, gates, logits. Without "
        "--config the run's own data is used; --config.data... changes it, --data "
        "takes its place.",
        CONFIG_HELP + TRACE_EXAMPLES,
    )
    trace.add_argument("run", type=_path, help="run directory")
    trace.add_argument(
        "--out", type=_path, required=True, help="the file; must not exist"
    )
    _add_data(trace)
    trace.add_argument(
        "--tokens", type=_positive, help="at most so many tokens; default: all"
    )
    trace.add_argument(
        "--step", type=_integer, help="of the checkpoint; default: the newest"
    )
    trace.add_argument(
        "--logits",
        action="store_true",
        help="also the router logits of the experts that were not chosen",
    )


def _add_analyse(command):
    analyse = command(
        "analyse",
        "Say what a trace tells of every router. Balance, how far experts follow "
        "domains and tokens, how far an expert tells the next one (docs/traces.md); no "
        "model is needed.",
        "",
    )
    analyse.add_argument("trace", type=_path, help="file of `moex trace`")
    analyse.add_argument(
        "--compare",
        type=_path,
        metavar="TRACE",
        help="of another checkpoint on the same data: how far routing is the same",
    )
    analyse.add_argument(
        "--token",
        action="append",
        metavar="TEXT",
        help="list the experts that go with this token, such as '<think>'; repeat it",
    )
    analyse.add_argument("--out", type=_path, help="numpy archive (.npz) of all counts")
    analyse.add_argument("--json", action="store_true", help="print JSON")


# Arguments of `convert` that are for one kind of conversion; None: not given.
LATENT_FLAGS = ("group", "latent", "ops", "rank", "refit", "whiten", "calibration")
UPCYCLE_FLAGS = (
    *("experts", "k", "split", "noise", "reinit", "scale", "layers", "seed"),
)


def given(args, names) -> dict:
    """Those of some arguments that the command line gives."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _add_convert(command):
    convert = command(
        "convert",
        "Write a run with other layers. moe: dense layers become MoE layers that "
        "compute the same function. latent: the experts of every MoE layer become "
        "small factors behind projections that groups of experts share; with --experts "
        "and --k dense layers become MoE layers first. The new run starts at step 0 "
        "and can be scored, sampled and trained on.",
        CONVERT_EXAMPLES,
    )
    convert.add_argument("run", type=_path, help="run directory")
    convert.add_argument("--to", choices=("latent", "moe"), required=True)
    convert.add_argument(
        "--workdir", type=_path, required=True, help="the new run directory"
    )
    _add_to_latent(convert.add_argument_group("to latent"))
    _add_to_moe(convert.add_argument_group("to moe"))


def _add_to_latent(group):
    group.add_argument(
        "--group", type=_positive, help="experts that share a projection; needed"
    )
    group.add_argument(
        "--latent", type=_positive, help="width of the projections; default: of experts"
    )
    group.add_argument("--ops", help="which of gate,up,down; default: gate,up")
    group.add_argument(
        "--rank", type=_positive, help="cut every expert to this rank first"
    )
    group.add_argument(
        "--refit",
        action="store_true",
        default=None,
        help="own factors from the uncut experts",
    )
    group.add_argument(
        "--whiten",
        action="store_true",
        default=None,
        help="keep what matters on training data, not for inputs of all directions",
    )
    group.add_argument(
        "--calibration",
        type=_positive,
        metavar="SEQUENCES",
        help="training sequences that --whiten looks at; default: 256",
    )


def _add_to_moe(group):
    group.add_argument(
        "--experts", type=_positive, help="copies of the dense feed-forward; needed"
    )
    group.add_argument("--k", type=_positive, help="copies that a token uses; needed")
    group.add_argument(
        "--split",
        type=_positive,
        help="cut every copy into so many experts; default: 1",
    )
    group.add_argument(
        "--noise",
        type=float,
        help="deviation of what is added to weights, over their own; default: 0",
    )
    group.add_argument(
        "--reinit",
        type=float,
        metavar="SHARE",
        help="share of each expert's hidden columns to draw again; default: 0",
    )
    group.add_argument(
        "--scale",
        help="what makes up for the gates of --split: gates or weights; default: gates",
    )
    group.add_argument(
        "--layers", help="all, every:N, last:N or numbers such as 0,3; default: all"
    )
    group.add_argument("--seed", type=_integer, help="default: 0")


def _add_interop(command):
    import_hf = command(
        "import-hf",
        "Make a run of a Hugging Face checkpoint folder. The folder holds a config and "
        "safetensors. The run starts at step 0 and can be scored, sampled and trained "
        "on. --config.a.b=value changes its run config, such as --config.mesh.fsdp=8.",
        INTEROP_EXAMPLES,
        usage="FOLDER --out RUN [options]",
    )
    import_hf.add_argument("folder", type=_path, help="the checkpoint folder")
    import_hf.add_argument(
        "--out", type=_path, required=True, help="the new run directory"
    )
    import_hf.add_argument(
        "--tokenizer", type=_path, help="file in place of its tokenizer.json"
    )
    import_hf.add_argument(
        "--doc-token", help="token between documents; default: its end-of-text token"
    )
    export_hf = command(
        "export-hf",
        "Write a run as a folder that transformers loads. An imported run leaves as "
        "its family, any other as the closest one, or is refused with the difference.",
        INTEROP_EXAMPLES,
    )
    export_hf.add_argument("run", type=_path, help="run directory")
    export_hf.add_argument("--out", type=_path, required=True, help="the new folder")
    export_hf.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16; default: as imported, else float32",
    )


def _path(text: str) -> pathlib.Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "must name a file or folder; the one you are in is '.'"
        )
    return pathlib.Path(text)


def _folder(text: str) -> pathlib.Path:
    path = _path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return path


def _integer(text: str) -> int:
    try:
        value = int(text)
    except ValueError:  # also of 4,300 digits and more
        value = None
    if value is None or abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at most {LARGEST:,}, not {short(text, 60)}"
        )
    return value


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _tolerance(text: str) -> tuple[float, float]:
    try:
        relative, absolute = map(
            float, (text if "," in text else f"{text},0").split(",")
        )
    except ValueError:
        relative, absolute = -1.0, 0.0
    if not (0 <= relative < 1 and 0 <= absolute < math.inf):
        raise argparse.ArgumentTypeError(
            f"must be RTOL or RTOL,ATOL with RTOL in [0, 1) and ATOL at least 0, not "
            f"{text!r}; runs come before it"
        )
    return relative, absolute
