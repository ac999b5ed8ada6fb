"""`moex eval`, on held-out data or on tasks of the lm_eval harness."""

from moex.commands import Verb
from moex.commands.arguments import add_data, add_json, add_run, scored_config
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
        add_data(parser)
        tasks = parser.add_argument_group(
            "tasks of the lm_eval harness (extra `eval`)", "Instead of held-out data."
        )
        tasks.add_argument(
            "--tasks", metavar="A,B", help="YAML files or names, between commas"
        )
        tasks.add_argument(
            "--include-path", type=path, metavar="FOLDER", help="of more tasks by name"
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
        result = (_tasks if args.tasks is not None else _held_out)(args, config_args)
        print(dump_json(result) if args.json else _text(args, result))


def _held_out(args, config_args) -> dict:
    for name in ("include_path", "limit", "num_fewshot"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: is for --tasks.")
    from moex.train.score import score_run

    cfg = scored_config(args, config_args)
    return score_run(args.run, cfg, sequences=args.sequences)


def _tasks(args, config_args) -> dict:
    from moex.serve.harness import score_tasks

    wrong = config_args + [f"--{n}" for n in ("data", "sequences") if getattr(args, n)]
    if wrong:
        raise ConfigError(
            f"{wrong[0]}: --tasks takes the config of the run; see --limit."
        )
    return score_tasks(
        args.run,
        args.tasks.split(","),
        include_path=args.include_path and str(args.include_path),
        limit=args.limit,
        num_fewshot=args.num_fewshot,
    )


def _text(args, result: dict) -> str:
    lines = [f"{args.run} at step {result['step']}"]
    if args.tasks is not None:
        lines[0] += ":"
        for task, figures in result["tasks"].items():
            lines += [f"  {task:<24} {n:<24} {v:.4f}" for n, v in figures.items()]
        return "\n".join(lines)
    what = f"tokens of {', '.join(args.data)}" if args.data else "held-out tokens"
    lines[0] += f", {result['tokens']:,} {what}:"
    lines.append(f"  loss           {result['nll']:.4f} nats per token")
    lines.append(f"  perplexity     {result['perplexity']:.3f}")
    if result["bytes"]:
        lines.append(f"  bits per byte  {result['bits_per_byte']:.4f}")
    lines += [f"  loss on {name}: {nll:.4f}" for name, nll in result["domains"].items()]
    return "\n".join(lines)
