"""The config that the flags of `moex train` describe."""

from moex.config.flags import load_config
from moex.runs.directory import RunDir, given_config


def trained_config(args, config_args: list[str], say=print):
    """The config of `moex train`: that of --config with --data, or that of the run.

    A run in `--workdir` goes on with its own config if there is no `--config`, and with
    its own `--data` if that is not given again.

    Args:
      args: with `workdir` and `data`, each of which may be None.
      config_args: `--config...` arguments.
      say: called with one line if the data is that of the run.
    """
    of_data = [a for a in config_args if a.startswith("--config.data.")]
    others = [a for a in config_args if a not in of_data]
    run = None if args.workdir is None else RunDir(args.workdir)
    run = run if run is not None and run.is_run() else None
    named = any(arg.startswith("--config=") for arg in config_args)
    base = None if run is None or named else run.config()
    if args.data:
        cfg = given_config(others, base)
        cfg.data = cfg.task.given(cfg.data, args.data, train=True)
        return load_config(of_data, cfg)
    cfg = given_config(config_args, base)
    if run is not None and named and not of_data:
        kept = run.config().data
        if kept.given and type(kept) is type(cfg.data) and kept != cfg.data:
            flags = " ".join(f"--data={path}" for path in kept.given)
            say(f"{run} goes on with the data that it was started with: {flags}")
            cfg.data = kept
    return cfg
