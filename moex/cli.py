"""`moex <command>`: from the command line to one function call each.

argparse reads the command and its own flags; everything that starts with `--config`
goes to ml_collections. A user's mistake is one line on stderr and exit code 2; a run
that cannot go on is one line and exit code 1.
"""

import argparse
import json
import logging
import pathlib
import sys
import warnings

from moex.config import ConfigError, ConfigWarning, nearest, require

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
    many = train.add_argument_group("several processes (one per host of a pod)")
    many.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes of a TPU pod, Slurm, Kubernetes or Open MPI job",
    )
    many.add_argument("--coordinator", metavar="HOST:PORT", help="join explicitly")
    many.add_argument("--num-processes", type=_positive, metavar="N")
    many.add_argument("--process-id", type=int, metavar="I", help="0 to N-1")
    config = command("config", "Print a resolved config, one field a line.")
    config.add_argument("--json", action="store_true", help="as JSON with type tags")
    _add_params(command)
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


def split_config_args(argv: list[str]) -> tuple[list[str], list[str]]:
    """`argv` -> (arguments for argparse, arguments for ml_collections).

    `--config.a b` becomes `--config.a=b`.
    """
    rest, config = [], []
    args = iter(argv)
    for arg in args:
        name = arg.split("=", 1)[0].lstrip("-")
        if not arg.startswith("-") or name.split(".")[0] != "config":
            rest.append(arg)
            continue
        if "=" not in arg:
            value = next(args, None)
            if value is None:
                raise ConfigError(f"{arg}: a value is missing; write {arg}=VALUE.")
            arg = f"{arg}={value}"
        config.append("--" + arg.lstrip("-"))
    return rest, config


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `moex` command."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        rest, config_args = split_config_args(argv)
        _check_command(rest)
        args = make_parser().parse_args(rest)
        _quiet()
        COMMANDS[args.command](args, config_args)
    except ConfigError as e:
        _fail(e, 2)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from the last checkpoint", 130)
    except OSError as e:  # such as a full disk; the text names the file
        _fail(e, 1)
    except RuntimeError as e:
        if not _is_run_error(e):
            raise
        _fail(e, 1)


def _check_command(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise ConfigError(
            f"{argv[0]!r}: no such command.{nearest(argv[0], COMMANDS)} "
            f"Commands are {', '.join(COMMANDS)}."
        )


def _fail(error, code: int) -> None:
    print(f"moex: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(code)


def _is_run_error(error: RuntimeError) -> bool:
    from moex.train.checkpoint import CheckpointError
    from moex.train.loop import TrainingStopped

    return isinstance(error, (CheckpointError, TrainingStopped))


def _quiet() -> None:
    """Libraries raise errors and print nothing: a person reads the run's own lines."""
    from absl import logging as absl_logging
    from flax import nnx

    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    nnx.set_graph_mode(False)
    show = warnings.showwarning

    def showwarning(message, category, *where, **options):
        if issubclass(category, ConfigWarning):
            print(f"moex: warning: {message}", file=sys.stderr)
        else:
            show(message, category, *where, **options)

    warnings.showwarning = showwarning
    report = sys.unraisablehook

    def unraisable(args):
        # After a failed save Tensorstore calls back into a loop that Orbax closed.
        if str(args.exc_value) != "Event loop is closed":
            report(args)

    sys.unraisablehook = unraisable


def _train(args, config_args):
    from moex.flags import load_config
    from moex.train.loop import train

    if args.workdir is None and not args.dry_run:
        raise ConfigError("--workdir: missing; give a folder, such as runs/first.")
    cfg = load_config(config_args)
    _join(args)
    train(cfg, args.workdir, dry_run=args.dry_run)


def _join(args) -> None:
    """Join the other processes of the job; before JAX sees any device.

    Raises:
      ConfigError: if the flags are incomplete or no cluster is found.
    """
    explicit = (args.coordinator, args.num_processes, args.process_id)
    if not args.distributed and explicit == (None, None, None):
        return
    if explicit != (None, None, None) and None in explicit:
        raise ConfigError(
            "--coordinator, --num-processes and --process-id go together; give all "
            "three, or --distributed alone to detect the cluster."
        )
    import jax

    try:
        jax.distributed.initialize(*explicit)
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"joining the processes of the job failed: {e}") from None


def _config(args, config_args):
    from moex import config
    from moex.flags import load_config

    cfg = load_config(config_args)
    print(
        json.dumps(config.to_dict(cfg), indent=1) if args.json else config.describe(cfg)
    )


def _params(args, config_args):
    from moex import params
    from moex.flags import load_config

    cfg = load_config(config_args)
    if (args.like is None) != (args.match is None):
        raise ConfigError("--like and --match go together; give both.")
    if args.like is not None:
        like = load_config([f"--config={args.like}"])
        result = params.matched(cfg, like, args.match)
        print(json.dumps(result) if args.json else params.match_lines(result))
        return
    rows = params.model_rows(cfg)
    if args.json:
        print(json.dumps(params.rows_dict(cfg, rows)))
    else:
        print(params.rows_table(cfg, rows))


def _eval(args, config_args):
    from moex.flags import load_config
    from moex.train.job import load_config as run_config
    from moex.train.score import score_run

    cfg = load_config(config_args, base=run_config(args.run))
    result = score_run(args.run, cfg, sequences=args.sequences)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{args.run} at step {result['step']}, {result['tokens']:,} held-out tokens:\n"
        f"  loss           {result['nll']:.4f} nats per token\n"
        f"  perplexity     {result['perplexity']:.3f}"
    )
    if result["bytes"]:
        print(f"  bits per byte  {result['bits_per_byte']:.4f}")
    for name, nll in result["domains"].items():
        print(f"  loss on {name}: {nll:.4f}")


def _generate(args, config_args):
    from moex.train.score import write_text

    if config_args:
        raise ConfigError(f"{config_args[0]}: generate takes the config of the run.")
    require(0 <= args.seed < 2**31, "--seed", args.seed, "in [0, 2**31)")
    prompts = args.prompt or [sys.stdin.read()]
    texts = write_text(
        args.run,
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    print("\n--------\n".join(texts))


def _convert(args, config_args):
    from moex.compress.convert import ToLatent, convert_run, report_text

    if config_args:
        raise ConfigError(f"{config_args[0]}: convert takes the config of the run.")
    if args.calibration and not args.whiten:
        raise ConfigError("--calibration: is for --whiten; give both.")
    options = ToLatent(
        group=args.group,
        latent=args.latent,
        ops=tuple(args.ops.split(",")),
        rank=args.rank,
        refit=args.refit,
        calibration=(args.calibration or 256) if args.whiten else 0,
    )
    print(report_text(convert_run(args.run, args.workdir, options)))
    print(
        f"go on training: moex train --config={args.workdir / 'config.py'} "
        f"--workdir={args.workdir}"
    )


def _data(args, config_args):
    from moex.data.pipeline import prepare
    from moex.data.report import inspect
    from moex.flags import load_config
    from moex.run import check_run

    cfg = load_config(config_args)
    check_run(cfg)
    prepared = prepare(
        cfg.data, cfg.seq_len, overlap=cfg.eval.overlap, where="config.data"
    )
    if args.action == "inspect":
        print(inspect(prepared, example=args.example))


COMMANDS = {
    "train": _train,
    "config": _config,
    "params": _params,
    "eval": _eval,
    "generate": _generate,
    "convert": _convert,
    "data": _data,
}


if __name__ == "__main__":
    main()
