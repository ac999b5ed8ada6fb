"""Flags of `moex place` for offloaded experts; `--help` needs no JAX and no numpy."""

import pathlib

from moex.config.arguments import integer, path, positive
from moex.config.base import ConfigError, require

# Flags of a simulation, without --simulate: their names and whether they take a value.
OF_SIMULATION = (
    *("slots", "policy", "batch", "regroup", "prefetch", "ahead", "impact"),
    *("allocate", "scheduler", "costs", "alpha", "tokens"),
)
OF_TRAINING = ("predictor_steps", "predictor_last")
SHARED = ("seed",)  # which they use as placements do
OF_RUN = pathlib.Path()  # stands for the file of the run


def add_simulate(parser) -> None:
    """Add `--simulate`, `--fit-predictor` and the flags beside them."""
    own = parser.add_argument_group("offloading (docs/offload.md)")
    only = own.add_mutually_exclusive_group()
    only.add_argument(
        "--simulate",
        action="store_true",
        help="replay the trace with few resident experts: hit rates of every policy "
        "and cache size, beside Belady's bound",
    )
    only.add_argument(
        "--fit-predictor",
        type=path,
        nargs="?",
        const=OF_RUN,
        metavar="FILE",
        help="train a predictor of experts on the trace, and write it; without FILE "
        "into the run of the trace, where --offload-prefetch=predictor finds it",
    )
    own.add_argument(
        "--slots", metavar="LIST", help="slots of a layer; default: 25%%,50%%,75%%"
    )
    own.add_argument("--policy", metavar="LIST", help="which policies; default: all")
    own.add_argument("--batch", type=positive, help="sequences in step; default: 1")
    own.add_argument(
        "--regroup",
        action="store_true",
        help="divide every two batches anew at each step, by like experts",
    )
    own.add_argument(
        "--prefetch",
        metavar="HOW",
        help="affinity, logits, perfect, or the file of a predictor; default: none",
    )
    own.add_argument(
        "--ahead", type=positive, help="layers to prefetch ahead; default: 1"
    )
    own.add_argument(
        "--impact",
        action="store_true",
        help="prefetch what saves most time, and nothing that saves none",
    )
    own.add_argument(
        "--allocate",
        help="slots of layers: equal (default), demand, or shared by all of them",
    )
    own.add_argument(
        "--scheduler",
        help="who computes a layer's experts: device (default), static, hss, "
        "hss_paper or best",
    )
    own.add_argument(
        "--costs", type=path, metavar="FILE", help="times of a machine, to show times"
    )
    own.add_argument("--alpha", type=float, help="of the policy mrs; default: 0.5")
    own.add_argument(
        "--tokens", type=positive, help="read at most so many; default: 4096"
    )
    own.add_argument(
        "--predictor-steps", type=positive, metavar="N", help="default: 600"
    )
    own.add_argument(
        "--predictor-last",
        type=integer,
        metavar="N",
        help="tokens that it reads; default: 4",
    )


def output(args) -> pathlib.Path | None:
    """The file that is written, if a flag names it."""
    return None if args.fit_predictor is OF_RUN else args.fit_predictor


def asked_for(args) -> str | None:
    """The flag that asks for work of this group, or None.

    Raises:
      ConfigError: for a flag that nothing looks at, such as one of a placement.
    """
    asked = "simulate" if args.simulate else None
    asked = "fit-predictor" if args.fit_predictor is not None else asked
    used = {"simulate": OF_SIMULATION, "fit-predictor": OF_TRAINING}.get(asked or "")
    needs = dict.fromkeys(OF_SIMULATION, "simulate")
    needs |= dict.fromkeys(OF_TRAINING, "fit-predictor")
    for name, flag in needs.items():
        given = getattr(args, name)
        if given is not None and given is not False and name not in (used or ()):
            told = name.replace("_", "-")
            raise ConfigError(f"--{told}: needs --{flag}.")
    return asked


def refuse_others(args, asked: str) -> None:
    """Raise `ConfigError` for a flag that only placements look at."""
    own = {"verb", "command", "trace", "json", "simulate", "fit_predictor"}
    own |= {*OF_SIMULATION, *OF_TRAINING, *SHARED}
    for name, value in vars(args).items():
        if name not in own and value is not None and value is not False:
            told = name.replace("_", "-")
            raise ConfigError(f"--{told}: is for placements; leave out --{asked}.")


def how_of(args):
    """The `report.How` of the flags."""
    from moex.offload.costs import Costs
    from moex.offload.report import How

    given = {name: getattr(args, name) for name in (*OF_SIMULATION, *SHARED)}
    given["policies"] = given.pop("policy")
    for name in ("slots", "policies"):
        if given[name] is not None:
            flag = "--policy" if name == "policies" else "--slots"
            text = given[name]
            given[name] = tuple(t.strip() for t in text.split(",") if t.strip())
            require(len(given[name]) > 0, flag, text, "one or more, between commas")
    if given["costs"] is not None:
        given["costs"] = Costs.read(given["costs"])
    return How(**{k: v for k, v in given.items() if v is not None})


def run(args, asked: str) -> None:
    """Do what was asked for, and print it."""
    from moex.analysis.trace import Trace
    from moex.json_files import dump_json

    refuse_others(args, asked)
    if asked == "simulate":
        from moex.offload import report

        how = how_of(args)
        with Trace.open(args.trace) as trace:
            found = report.simulation(trace, how)
        print(dump_json(found) if args.json else "\n".join(report.lines(found)))
        return
    from moex.analysis.writer import check_new
    from moex.offload.fit import Training, fit, table
    from moex.offload.predictor import MOST_LAST

    given = {"steps": args.predictor_steps, "seed": args.seed}
    training = Training(**{k: v for k, v in given.items() if v is not None})
    sizes = {}
    if (last := args.predictor_last) is not None:
        allowed = f"from 1 to {MOST_LAST:,}"
        require(1 <= last <= MOST_LAST, "--predictor-last", last, allowed)
        sizes["last"] = last
    with Trace.open(args.trace) as trace:
        file = check_new(_target(args, trace), "--fit-predictor")
        predictor = fit(trace, training, **sizes)
    predictor.save(file)
    if args.json:
        print(dump_json(predictor.recall))
        return
    print("\n".join(table(predictor.recall)))
    count = sum(a.size for a in predictor.params.values())
    print(f"{file}: {count:,} parameters")


def _target(args, trace):
    """The file of the predictor; that of the run of the trace, if none is named."""
    from moex.runs.directory import RunDir

    if args.fit_predictor is not OF_RUN:
        return args.fit_predictor
    run = RunDir(trace.header.run)
    if not run.is_run():
        raise ConfigError(
            f"--fit-predictor: the trace is of {run}, which is no run here; give a "
            "file."
        )
    return run.predictor
