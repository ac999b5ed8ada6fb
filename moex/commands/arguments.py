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
