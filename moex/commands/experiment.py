"""`moex experiment`; see docs/experiments.md."""

from moex.commands import Verb
from moex.config.arguments import integer, path
from moex.config.base import ConfigError, require
from moex.process import fail, use_cpu


class Command(Verb):
    """List, run or check experiments: arms with several seeds, and verdicts on claims.

    An experiment is a folder experiments/NAME; its README has the question, the tables
    and the verdicts. `run` does what is missing in results.json and goes on where it
    was stopped; `check` makes tables and verdicts again from what is there.
    """

    talks = True
    left = "finished arms are in results.json; the same command goes on"
    examples = """
    Examples:
      moex experiment list
      moex experiment run chain_of_experts --dry-run
      moex experiment run chain_of_experts --jobs=2
      moex experiment check chain_of_experts
    """
    usage = "list | run NAME | check [NAME ...] [options]"
    refuses_config = "takes the configs of the experiment"

    def add(self, parser):
        parser.add_argument("action", choices=("list", "run", "check"))
        parser.add_argument("names", nargs="*", metavar="NAME")
        parser.add_argument("--size", default=None, help="cpu (default) or gpu")
        parser.add_argument("--arms", help="only these arms, A,B")
        parser.add_argument("--seeds", help="these seeds instead of its own, 0,1")
        parser.add_argument(
            "--jobs", type=integer, metavar="N",
            help="arms at the same time, which share the cores; steps are slower then, "
            "so that times of other numbers of jobs are not comparable",
        )  # fmt: skip
        parser.add_argument(
            "--workdir", type=path, help="default: runs/experiments/NAME/SIZE"
        )
        parser.add_argument(
            "--again", action="store_true", help="do arms that have results again"
        )
        parser.add_argument(
            "--write", action="store_true",
            help="check: write READMEs and plots anew, from what is there",
        )  # fmt: skip
        parser.add_argument(
            "--dry-run", action="store_true", help="list what is left, and stop"
        )
        parser.add_argument(
            "--in-process",
            action="store_true",
            help="do the arms in this process, to debug them",
        )

    def output(self, args):
        return None

    def run(self, args, config_args):
        from moex.experiment import verbs

        if args.action == "run":
            require(not args.write, "--write", True, "left out of `experiment run`")
            require(len(args.names) == 1, "run", args.names, "one name of experiments")
            verbs.run(args, print)
            return
        own = ("arms", "seeds", "workdir", "again", "dry_run", "in_process", "jobs")
        for flag in own:
            if getattr(args, flag):
                name = f"--{flag.replace('_', '-')}"
                raise ConfigError(f"{name}: is for `moex experiment run`.")
        use_cpu()
        if args.action == "list":
            for flag in ("size", "write"):
                if getattr(args, flag):
                    raise ConfigError(f"--{flag}: is not for `moex experiment list`.")
            print(verbs.listed(args.names))
            return
        if args.write:
            for found in verbs.chosen(args.names):
                verbs.refresh(found)
        if wrong := verbs.check(args.names, args.size, print):
            fail(wrong, 1)
