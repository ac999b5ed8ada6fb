"""Arguments that several verbs share."""

from moex import hints
from moex.config.arguments import folder, path
from moex.config.base import ConfigError


def add_run(parser) -> None:
    """Add the run directory that a verb opens."""
    parser.add_argument("run", type=run_dir, help="run directory")


def run_dir(text: str):
    """The argument type of a run directory, which need not exist."""
    from moex.runs.directory import RunDir  # imports JAX, which --help does not need

    return RunDir(path(text))


def add_project(parser) -> None:
    """Add `--project`, which every verb has: the folder of a user's own classes."""
    parser.add_argument(
        "--project",
        type=folder,
        metavar="FOLDER",
        help="where config classes of your own are looked for; default: the folder of "
        "the config file, or the one you are in",
    )


def add_json(parser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_data(parser, use: str) -> None:
    """Add `--data`; `scored_config` or `runs.given.trained_config` reads it.

    Args:
      use: how the files are used, such as "train on this".
    """
    parser.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help=f"{use} file (or folder, or glob); repeat it for several, each a domain. "
        "Text, .jsonl of text, messages or prompt and response, both as .gz or .zst "
        "too, .parquet, .arrayrecord, a dataset saved to disk; CSV for series "
        "(docs/data.md)",
    )


def add_steer(parser) -> None:
    """Add `--steer`; `steering_of` reads the file."""
    parser.add_argument(
        "--steer",
        type=path,
        metavar="FILE",
        help="scale, force or ban experts as this file says (docs/steering.md); a plan "
        "of kept experts bans the others",
    )


def steering_of(args):
    """The `Steering` of `--steer`, or None."""
    from moex.model.steering import Steering

    return None if args.steer is None else Steering.read(args.steer)


def add_offload(parser) -> None:
    """Add `--offload` and what belongs to it; `offload_of` reads them."""
    group = parser.add_argument_group(
        "experts that wait on the host", "For models larger than the device."
    )
    group.add_argument(
        "--offload",
        metavar="SIZE",
        help="keep experts in a file and this many on the device: of a layer on "
        "average (8), a share of all (25%%), or bytes (2GiB); the result is the same "
        "(docs/offload.md)",
    )
    group.add_argument(
        "--offload-policy",
        metavar="NAME",
        help="which expert leaves for another one: lru (default), lfu, mrs, or "
        "predicted (with --offload-prefetch), static (with --offload-trace)",
    )
    group.add_argument(
        "--offload-trace",
        type=path,
        metavar="TRACE",
        help="of moex trace: with --offload-policy=static, the experts that are used "
        "most there stay",
    )
    group.add_argument(
        "--offload-bank",
        metavar="PLACE",
        help="where the others wait: on disk (default), in a file that is mapped into "
        "memory, or in pinned memory of the host",
    )
    group.add_argument(
        "--offload-prefetch",
        action="store_true",
        default=None,
        help="load what the next layer would need now, while a layer computes",
    )
    group.add_argument(
        "--offload-host",
        action="store_true",
        default=None,
        help="let the cores of the host compute experts where that is quicker than "
        "moving them, by times that are measured first",
    )


def offload_of(args):
    """The `Settings` of `--offload`, or None."""
    names = ("policy", "bank", "prefetch", "host", "trace")
    given = {name: getattr(args, f"offload_{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if args.offload is None:
        for name in given:
            raise ConfigError(f"--offload-{name}: is for --offload; give both.")
        return None
    from moex.offload.settings import Settings

    return Settings(args.offload, weights=args.weights, **given)


def add_weights(parser) -> None:
    """Add `--weights`."""
    parser.add_argument(
        "--weights",
        choices=("bfloat16", "int8", "int4"),
        help="keep the matrices of experts, attention and logits so: fewer bytes, "
        "quicker to decode with on a CPU, less exact (docs/kernels.md); default: as "
        "the checkpoint is",
    )


def scored_config(args, config_args: list[str]):
    """The config of `args.run` with changes by `config_args`, or with `--data`.

    Raises:
      ConfigError: if both `--data` and a config of data are given, or either is wrong.
    """
    from moex.runs.directory import given_config

    for arg in config_args if args.data else ():
        if arg.startswith(("--config=", "--config.data")):
            raise ConfigError(
                f"{arg.split('=')[0]}: --data takes the place of config.data; give "
                "one of the two."
            )
    cfg = given_config(config_args, base=args.run.config())
    if args.data:
        cfg.data = cfg.task.given(cfg.data, args.data)
    return cfg


def train_on(run) -> str:
    """The command that goes on training in a run directory."""
    return hints.command("moex", "train", f"--workdir={run}")
