"""`moex convert`; see docs/convert.md."""

from moex.commands import Verb
from moex.commands.arguments import add_run, given, integer, path, positive
from moex.config.base import ConfigError

# Arguments that are for one kind of conversion; None: not given.
LATENT_FLAGS = ("group", "latent", "ops", "rank", "refit", "whiten", "calibration")
UPCYCLE_FLAGS = (
    *("experts", "k", "split", "noise", "reinit", "scale", "layers", "seed"),
)


class Command(Verb):
    """Write a run with other layers.

    moe: dense layers become MoE layers that compute the same function. latent: the
    experts of every MoE layer become small factors behind projections that groups of
    experts share; with --experts and --k dense layers become MoE layers first. The new
    run starts at step 0 and can be scored, sampled and trained on.
    """

    examples = """
    Examples:
      moex convert runs/dense --to=moe --experts=8 --k=2 --workdir=runs/moe
      moex convert runs/dense --to=moe --experts=8 --k=1 --split=4 --layers=every:2 \\
        --workdir=runs/fine
      moex convert runs/moe --to=latent --group=8 --latent=64 --workdir=runs/latent
    """
    refuses_config = "takes the config of the run"

    def add(self, parser):
        add_run(parser)
        parser.add_argument("--to", choices=("latent", "moe"), required=True)
        parser.add_argument(
            "--workdir", type=path, required=True, help="the new run directory"
        )
        _add_to_latent(parser.add_argument_group("to latent"))
        _add_to_moe(parser.add_argument_group("to moe"))

    def run(self, args, config_args):
        from moex.convert.apply import convert_run, report_text

        latent, upcycle = _conversion(args)
        print(report_text(convert_run(args.run, args.workdir, latent, upcycle=upcycle)))
        print(
            f"go on training: moex train --config={args.workdir / 'config.py'} "
            f"--workdir={args.workdir}"
        )


def _add_to_latent(group):
    group.add_argument(
        "--group", type=positive, help="experts that share a projection; needed"
    )
    group.add_argument(
        "--latent", type=positive, help="width of the projections; default: of experts"
    )
    group.add_argument("--ops", help="which of gate,up,down; default: gate,up")
    group.add_argument(
        "--rank", type=positive, help="cut every expert to this rank first"
    )
    group.add_argument(
        "--refit",
        action="store_true",
        default=None,
        help="own factors from the uncut experts",
    )
    group.add_argument(
        "--whiten",
        action="store_true",
        default=None,
        help="keep what matters on training data, not for inputs of all directions",
    )
    group.add_argument(
        "--calibration",
        type=positive,
        metavar="SEQUENCES",
        help="training sequences that --whiten looks at; default: 256",
    )


def _add_to_moe(group):
    group.add_argument(
        "--experts", type=positive, help="copies of the dense feed-forward; needed"
    )
    group.add_argument("--k", type=positive, help="copies that a token uses; needed")
    group.add_argument(
        "--split",
        type=positive,
        help="cut every copy into so many experts; default: 1",
    )
    group.add_argument(
        "--noise",
        type=float,
        help="deviation of what is added to weights, over their own; default: 0",
    )
    group.add_argument(
        "--reinit",
        type=float,
        metavar="SHARE",
        help="share of each expert's hidden columns to draw again; default: 0",
    )
    group.add_argument(
        "--scale",
        help="what makes up for the gates of --split: gates or weights; default: gates",
    )
    group.add_argument(
        "--layers", help="all, every:N, last:N or numbers such as 0,3; default: all"
    )
    group.add_argument("--seed", type=integer, help="default: 0")


def _conversion(args):
    """`(ToLatent or None, Upcycle or None)` of the arguments of `convert`."""
    from moex.convert.to_latent import ToLatent
    from moex.convert.upcycle import Upcycle

    latent, upcycle = given(args, LATENT_FLAGS), given(args, UPCYCLE_FLAGS)
    if args.to == "moe" and latent:
        raise ConfigError(f"--{min(latent)}: is for --to=latent.")
    if upcycle or args.to == "moe":
        for name in ("experts", "k"):
            if name not in upcycle:
                raise ConfigError(f"--{name}: missing; dense layers need it.")
    made = Upcycle(**upcycle) if upcycle else None
    if args.to == "moe":
        return None, made
    if "group" not in latent:
        raise ConfigError("--group: missing; how many experts share a projection?")
    whiten = latent.pop("whiten", False)
    if "calibration" in latent and not whiten:
        raise ConfigError("--calibration: is for --whiten; give both.")
    if whiten:
        latent.setdefault("calibration", 256)
    if "ops" in latent:
        latent["ops"] = tuple(latent["ops"].split(","))
    return ToLatent(**latent), made
