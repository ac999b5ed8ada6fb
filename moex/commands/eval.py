"""`moex eval`, on held-out data or on tasks of the lm_eval harness."""

from moex.commands import Verb, arguments
from moex.config.arguments import integer, path, positive
from moex.config.base import ConfigError
from moex.json_files import dump_json
from moex.serve.flags import add_offload, add_weights, offload_of


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
        arguments.add_run(parser)
        arguments.add_json(parser)
        parser.add_argument(
            "--sequences", type=positive, help="score at most this many sequences"
        )
        arguments.add_data(parser, "score all of this")
        arguments.add_steer(parser)
        add_offload(parser)
        add_weights(parser)
        tasks = parser.add_argument_group(
            "tasks of the lm_eval harness (extra `eval`)", "Instead of held-out data."
        )
        add = tasks.add_argument
        add("--tasks", metavar="A,B", help="YAML files or names, between commas")
        told = "has more tasks by name"
        add("--include-path", type=path, metavar="FOLDER", help=told)
        add("--limit", type=positive, help="at most this many documents of a task")
        told = "examples before each question"
        add("--num-fewshot", type=integer, metavar="N", help=told)

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

    cfg = arguments.scored_config(args, config_args)
    steering = arguments.steering_of(args)
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
        steering=arguments.steering_of(args),
        weights=args.weights,
    )
    figures = ((t, *row) for t, own in result["tasks"].items() for row in own.items())
    return result, "", [f"  {t:<24} {name:<24} {v:.4f}" for t, name, v in figures]
