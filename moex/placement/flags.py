"""Flags of `moex place`, and what they ask for."""

from moex.config.arguments import integer, path, positive
from moex.config.base import ConfigError, require_choice
from moex.json_files import field

HELD_OUT = 4  # of so many examples one is held out
# Flags that say how a placement is made, which a plan has said already.
OF_THE_PLAN = ("devices", "nodes", "out", "replicas")


def add_placement(parser) -> None:
    """Add the flags of a new placement, and of one that is scored."""
    parser.add_argument(
        "--devices", type=integer, help="devices that hold experts, of all nodes"
    )
    parser.add_argument(
        "--nodes",
        type=integer,
        help="nodes; devices that are neighbours share one, and first few tokens "
        "change nodes; default: 1",
    )
    parser.add_argument(
        "--method",
        help="lsa (coordinate descent, default) or milp (exact where there is "
        "time, with the gap to it)",
    )
    parser.add_argument(
        "--by",
        help="transitions of tokens between layers (default), or coactivation: "
        "experts of one layer that tokens have together",
    )
    parser.add_argument(
        "--slack",
        type=float,
        metavar="X",
        help="at most 1 + X times the mean load of a layer on a device; default: "
        "any load",
    )
    parser.add_argument(
        "--held-out",
        type=path,
        metavar="FILE",
        help="another trace, or sums, to score by; default: every 4th example",
    )
    parser.add_argument(
        "--held-out-every",
        type=integer,
        metavar="N",
        help="hold out every N-th example of the trace; 0: none",
    )
    parser.add_argument(
        "--plan", type=path, metavar="FILE", help="score this plan on the trace"
    )
    parser.add_argument("--out", type=path, metavar="FILE", help="write the plan")
    parser.add_argument(
        "--replicas",
        type=positive,
        metavar="N",
        help="also show which experts of a layer get copies, N replicas in all, "
        "by load (EPLB)",
    )
    parser.add_argument(
        "--restarts", type=integer, help="random starts of lsa; default: 20"
    )
    parser.add_argument("--seed", type=integer, help="of them; default: 0")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="of each program of milp; default: 60",
    )


def how_of(args, plan):
    """The `How` of the flags; `plan` is that of `--plan`, or None.

    Raises:
      ConfigError: for a flag that is missing, or not for a plan that is there.
    """
    from moex.placement.solve import How

    if plan is None and args.devices is None:
        raise ConfigError("--devices: missing; on how many devices are the experts?")
    for name in OF_THE_PLAN if plan is not None else ():
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name}: is for a new placement; --plan is one.")
    names = ("devices", "nodes", "method", "slack", "restarts", "seed", "time_limit")
    given = {name: getattr(args, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return How(**{"devices": 2} | given)


def objective_of(args, plan) -> str:
    """One of `affinity.OBJECTIVES`: that of the flag, or of the plan."""
    from moex.placement.affinity import OBJECTIVES

    if args.by is not None:
        return args.by
    if plan is None:
        return OBJECTIVES[0]
    found = field(plan.how, "by", str, f"{plan.where}: how", OBJECTIVES[0])
    require_choice(f"{plan.where}: how.by", found, OBJECTIVES)
    return found


def every_of(args) -> int:
    """The number of examples of which one is held out; 0: none."""
    given = args.held_out_every
    if given is None:
        return HELD_OUT
    if args.held_out is not None:
        raise ConfigError("--held-out-every: --held-out is another file; leave it out.")
    if given < 0 or given == 1:
        raise ConfigError(
            f"--held-out-every = {given}: must be at least 2, or 0 for none."
        )
    return given
