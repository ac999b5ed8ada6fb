"""`moex eval`, on held-out data or on tasks of the lm_eval harness."""

from moex.commands import Verb
from moex.commands.arguments import (
    add_data,
    add_json,
    add_offload,
    add_run,
    add_steer,
    add_weights,
    offload_of,
    scored_config,
    steering_of,
)
from moex.config.arguments import integer, path, positive
from moex.config.base import ConfigError
from moex.json_files import dump_json


class Command(Verb):
    """Score held-out data with the newest checkpoint of a run.

    Without --config the run's own data is used; --config.data... changes it, --data
    takes its place.
    """

    examples = """
    Examples:
      moex eval runs/first
      moex eval runs/first --data=web.txt --data='code/*.py'
    """

    def add(self, parser):
        add_run(parser)
        add_json(parser)
        parser.add_argument(
            "--sequences", type=positive, help="score at most this many sequences"
        )
        add_data(parser, "score all of this")
        add_steer(parser)
        add_offload(parser)
        add_weights(parser)
        tasks = parser.add_argument_group(
            "tasks of the lm_eval harness (extra `eval`)", "Instead of held-out data."
        )
        tasks.add_argument(
            "--tasks", metavar="A,B", help="YAML files or names, between commas"
        )
        tasks.add_argument(
            "--include-path", type=path, metavar="FOLDER", help="has more tasks by name"
        )
        tasks.add_argument(
            "--limit", type=positive, help="at most this many documents of a task"
        )
        tasks.add_argument(
            "--num-fewshot",
            type=integer,
            metavar="N",
            help="examples before each question",
        )

    def run(self, args, config_args):
        score = _held_out if args.tasks is None else _tasks
        result, what, lines = score(args, config_args)
        head = f"{args.run} at step {result['step']}{what}:"
        print(dump_json(result) if args.json else "\n".join([head, *lines]))


def _held_out(args, config_args):
    """Score held-out data; return (figures, what was scored in words, lines)."""
    for name in ("include_path", "limit", "num_fewshot"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: is for --tasks.")
    from moex.runs.score import score_run, score_text

    cfg = scored_config(args, config_args)
    steering = steering_of(args)
    how: dict = {"sequences": args.sequences, "steering": steering}
    offload = offload_of(args)
    if offload is None:
        result = score_run(args.run, cfg, weights=args.weights, **how)
    else:
        from moex.offload.score import score_offloaded

        result = score_offloaded(args.run, cfg, offload, **how)
    what = f"tokens of {', '.join(args.data)}" if args.data else "held-out tokens"
    return result, f", {result['tokens']:,} {what}", score_text(cfg.task, result)


def _tasks(args, config_args):
    from moex.serve.harness import score_tasks

    if offload_of(args) is not None:
        raise ConfigError("--offload: cannot be used together with --tasks.")
    wrong = config_args + [f"--{n}" for n in ("data", "sequences") if getattr(args, n)]
    if wrong:
        raise ConfigError(
            f"{wrong[0]}: --tasks takes the config of the run; see --limit."
        )
    result = score_tasks(
        args.run,
        args.tasks.split(","),
        include_path=args.include_path and str(args.include_path),
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        steering=steering_of(args),
        weights=args.weights,
    )
    figures = ((t, *row) for t, own in result["tasks"].items() for row in own.items())
    return result, "", [f"  {t:<24} {name:<24} {v:.4f}" for t, name, v in figures]
