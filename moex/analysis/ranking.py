"""Rankings of experts for steering: `moex analyse --npmi` and `--risk-difference`."""

import dataclasses

from moex.analysis import marking
from moex.analysis.flags import DEFAULT_SCALE, DEFAULT_TOP, markers_of
from moex.analysis.scores import best
from moex.analysis.writer import check_new
from moex.config.base import ConfigError, require
from moex.json_files import dump_json
from moex.model.steering import MOST


def rank(args) -> None:
    """Print experts by nPMI with markers, or by the difference of two traces.

    Args:
      args: with the flags that `add_ranking` adds, `trace` and `json`.

    Raises:
      ConfigError: for a flag or a file that does not fit.
    """
    share = args.min_support
    ok = share is None or 0 <= share <= 1
    require(ok, "--min-support", share, "in [0, 1]")
    factor = DEFAULT_SCALE if args.scale is None else args.scale
    require(0 <= factor <= MOST, "--scale", factor, f"in [0, {MOST:.1e}]")
    top = DEFAULT_TOP if args.top is None else args.top
    markers, against = markers_of(args, "npmi"), markers_of(args, "against")
    if args.steer_out is not None:
        check_new(args.steer_out, "--steer-out")
    if args.risk_difference is None:
        every = (*markers, *against)
        counts = marking.read_counts(args.trace, every, args.start)
        weights = [1.0] * len(markers) + [-1.0] * len(against)
        score = marking.marker_scores(counts, every, weights, share)
        steering = marking.scaled(score, top, factor)
        what, chosen = "nPMI", best(score, top)
    else:
        if markers or against or share is not None:
            raise ConfigError("--risk-difference: give it without markers.")
        if args.scale is not None:
            raise ConfigError("--scale: is for --npmi; --risk-difference scales none.")
        files = (args.trace, args.risk_difference)
        pair = [marking.read_counts(file, (), args.start) for file in files]
        score = marking.risk_scores(*pair)
        steering = marking.switched(score, top)
        size = {layer: abs(score_E) for layer, score_E in score.items()}
        what, chosen = "risk difference", best(size, top)
    rows = [{"layer": n, "expert": e, what: float(score[n][e])} for n, e, _ in chosen]
    if args.steer_out is not None:
        if not steering.layers:
            raise ConfigError(
                f"--steer-out: every {what} is 0; there is nothing to steer."
            )
        how = {
            "score": what,
            "trace": str(args.trace),
            "markers": list(map(str, markers)),
            "against": list(map(str, against)),
            "experts": rows,
        }
        if args.risk_difference is not None:
            how["without"] = str(args.risk_difference)
        dataclasses.replace(steering, how=how).save(args.steer_out)
    if args.json:
        print(dump_json({"experts": rows}))
        return
    for row in rows:
        print(f"layer {row['layer']}, expert {row['expert']}: {what} {row[what]:.3f}")
    if args.steer_out is not None:
        print(f"{args.steer_out}: for moex generate --steer, moex eval --steer")
