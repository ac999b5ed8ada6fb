"""Flags of `moex generate` and `moex eval`; `--help` needs no JAX and no numpy."""

from moex.config.arguments import path, positive
from moex.config.base import ConfigError


def add_parts(parser) -> None:
    """Add `--adapter`, `--use` and `--experts`: parts that a model is used with."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="[NAME=]FOLDER",
        default=[],
        help="a run with adapters on this run, or a folder of adapters for it; "
        "repeat it for several. The run is loaded once",
    )
    parser.add_argument(
        "--use",
        action="append",
        metavar="NAME",
        default=[],
        help="the adapter for all prompts, or once for each prompt in order; "
        "'base': none; needed with several adapters",
    )
    parser.add_argument(
        "--experts",
        metavar="TASK:STORE",
        help="read only the experts of a task (auto: the one nearest to the "
        "first prompt) of a store of moex convert --to=subset --write-store",
    )


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
        "--offload-allocate",
        metavar="HOW",
        help="slots of layers: equal (default, where each can have one), by demand "
        "(with --offload-trace), or shared by all of them",
    )
    group.add_argument(
        "--offload-trace",
        type=path,
        metavar="TRACE",
        help="of moex trace: the experts that are used most there stay "
        "(--offload-policy=static), or layers that use more of them get more slots "
        "(--offload-allocate=demand)",
    )
    group.add_argument(
        "--offload-bank",
        metavar="PLACE",
        help="where the others wait: on disk (default), in a file that is mapped into "
        "memory, or in pinned memory of the host",
    )
    group.add_argument(
        "--offload-prefetch",
        nargs="?",
        const="router",
        metavar="HOW",
        help="load experts ahead while a layer computes: what the router of the next "
        "layer would take now (router, which the bare flag means); of the next three "
        "layers what saves most time (impact); or what a predictor names: that of the "
        "run (predictor), or a file of moex place --fit-predictor",
    )
    group.add_argument(
        "--offload-ahead",
        type=positive,
        metavar="N",
        help="so many layers ahead; default: 1 with router, 3 with impact, else all",
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
    names = ("policy", "bank", "prefetch", "ahead", "allocate", "host", "trace")
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
