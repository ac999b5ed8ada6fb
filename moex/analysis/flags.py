"""Flags that record sums and rank experts; `--help` needs no JAX and no numpy."""

from moex.config.arguments import path, positive
from moex.config.base import ConfigError

DEFAULT_TOP, DEFAULT_SCALE = 2, 4.0  # of a ranking of experts


def add_markers(parser, name: str, use: str) -> None:
    """Add `--NAME` for tokens and `--NAME-span` for spans; `markers_of` reads them."""
    parser.add_argument(
        f"--{name}",
        action="append",
        metavar="TEXT",
        default=[],
        help=f"{use}, such as '<think>', or '#12' for the token 12; repeat it",
    )
    parser.add_argument(
        f"--{name}-span",
        action="append",
        metavar=("BEGIN", "END"),
        nargs=2,
        default=[],
        help="the same for all positions between two tokens; repeat it",
    )


def markers_of(args, name: str) -> tuple:
    """The `Marker`s of the flags that `add_markers` added, tokens first."""
    from moex.analysis.markers import Marker

    spans = getattr(args, f"{name}_span".replace("-", "_"))
    return (
        *map(Marker, getattr(args, name.replace("-", "_"))),
        *(Marker(begin, end) for begin, end in spans),
    )


def add_sums(parser) -> None:
    """Add the flags of the sums that `moex trace` writes."""
    sums = parser.add_argument_group("sums (docs/traces.md)")
    only = sums.add_mutually_exclusive_group()
    only.add_argument(
        "--sums", action="store_true", help="write them too, to OUT.sums.npz"
    )
    only.add_argument(
        "--sums-only", action="store_true", help="write them to OUT, and no trace"
    )
    sums.add_argument(
        "--by-domain", action="store_true", help="also the sums of each domain"
    )
    sums.add_argument(
        "--pool",
        type=positive,
        metavar="N",
        help="experts of a token that TCESS and PEU look at, those of greatest "
        "logits; default: as many as it chose",
    )
    add_markers(sums, "marker", "count the experts at this token")


def check_sums(args) -> None:
    """Check that flags of sums are given with `--sums` or `--sums-only`."""
    given = {
        "by-domain": args.by_domain,
        "pool": args.pool,
        "marker": args.marker or args.marker_span,
    }
    for name, value in given.items():
        if value and not (args.sums or args.sums_only):
            raise ConfigError(f"--{name}: is for --sums.")
    if args.sums_only and args.logits:
        raise ConfigError("--logits: is for a trace; --sums-only writes none.")


def recorded_of(args):
    """The `Recorded` of the flags that `add_sums` added."""
    from moex.analysis.record_sums import Recorded

    markers = markers_of(args, "marker")
    return Recorded(markers=markers, by_domain=args.by_domain, pool=args.pool)


def add_ranking(parser) -> None:
    """Add the flags of `moex analyse` that rank experts."""
    rank = parser.add_argument_group(
        "experts to steer (docs/steering.md)", "These print a ranking alone."
    )
    add_markers(rank, "npmi", "rank experts that go with this token")
    add_markers(rank, "against", "rank those lower that go with this token")
    rank.add_argument(
        "--risk-difference",
        type=path,
        metavar="TRACE",
        help="of the same prompts without the behaviour: rank experts by the share "
        "of tokens that have them here, less the share there",
    )
    rank.add_argument(
        "--from",
        dest="start",
        metavar="TEXT",
        help="only count the tokens of a document from this one on: what is before "
        "is its prompt",
    )
    rank.add_argument(
        "--min-support",
        type=float,
        metavar="SHARE",
        help="leave out experts that fewer of a marker's positions have; default: "
        "0.5 for a token, 0.1 for a span",
    )
    rank.add_argument(
        "--top", type=positive, help=f"how many experts; default: {DEFAULT_TOP}"
    )
    rank.add_argument(
        "--steer-out",
        type=path,
        metavar="FILE",
        help="write a steering file: it scales their gates, or with "
        "--risk-difference forces or bans them",
    )
    rank.add_argument(
        "--scale",
        type=float,
        help=f"the factor of gates; default: {DEFAULT_SCALE:g}",
    )


def ranks(args) -> bool:
    """Whether experts are ranked.

    Raises:
      ConfigError: for flags of a ranking, or a file of sums, without one.
    """
    if args.npmi or args.npmi_span or args.risk_difference:
        for name in ("compare", "token", "out"):
            if getattr(args, name) is not None:
                told = "is for figures of a trace, not for a ranking of experts"
                raise ConfigError(f"--{name}: {told}.")
        return True
    for name in (
        *("against", "against_span", "start", "min_support", "steer_out"),
        *("top", "scale"),
    ):
        if getattr(args, name) not in (None, []):
            flag = "from" if name == "start" else name.replace("_", "-")
            raise ConfigError(f"--{flag}: is for --npmi or --risk-difference.")
    if args.trace.suffix == ".npz":
        raise ConfigError(
            f"{args.trace}: is no trace; sums are for --npmi here, and for "
            "`moex report --sums`."
        )
    return False
