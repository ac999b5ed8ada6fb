"""Latent experts: small factors behind projections that groups of experts share.

The model and its parameters are in `to_latent.py`, the mathematics of one layer is in
`latent.py`.
"""

import dataclasses

from moex.config.arguments import positive
from moex.config.base import ConfigError, require
from moex.convert.base import SHARED, Conversion


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToLatent(Conversion):
    """Latent experts in every MoE layer."""

    kind = "latent"
    about = (
        "the experts of every MoE layer become small factors behind projections that "
        "groups of experts share; with --experts and --k dense layers become MoE "
        "layers first"
    )
    flags = {
        "group": dict(type=positive, help="experts that share a projection; needed"),
        "latent": dict(
            type=positive, help="width of the projections; default: of experts"
        ),
        "ops": dict(help="which of gate,up,down; default: gate,up"),
        "rank": dict(type=positive, help="cut every expert to this rank first"),
        "refit": dict(action="store_true", help="own factors from the uncut experts"),
        "whiten": dict(
            action="store_true",
            help="keep what matters on training data, not for inputs of all directions",
        ),
        "calibration": SHARED["calibration"],
    }
    needed = {"group": "how many experts share a projection?"}
    may_follow = ("moe",)

    group: int  # experts that share a space, >= 1
    # Width Z of the shared spaces; None: the width of the experts.
    latent: int | None = None
    ops: tuple[str, ...] = ("gate", "up")  # which of "gate", "up", "down" are factored
    rank: int | None = None  # see `Factoring`
    refit: bool = False  # see `Factoring`
    # Training sequences whose second moments whiten the inputs of gate and up; 0: plain
    # weights.
    calibration: int = 0

    @classmethod
    def from_flags(cls, given):
        options = dict(given)
        whiten = options.pop("whiten", False)
        if "calibration" in options and not whiten:
            raise ConfigError("--calibration: is for --whiten; give both.")
        if whiten:
            options.setdefault("calibration", 256)
        if "ops" in options:
            options["ops"] = tuple(options["ops"].split(","))
        if options.get("refit") and "rank" not in options:
            raise ConfigError("--refit: is for --rank; give both.")
        made = cls(**options)
        if whiten and not {"gate", "up"} & set(made.ops):
            raise ConfigError("--whiten: is for gate and up; --ops has neither.")
        return made

    def check(self):
        for name in ("group", "latent", "rank"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}", value, "at least 1")
        require(self.calibration >= 0, "--calibration", self.calibration, ">= 0")

    def model(self, model):
        from moex.convert.to_latent import latent_model

        return latent_model(model, self)

    def arrays(self, run, job, say):
        from moex.convert.calibrate import input_moments
        from moex.convert.to_latent import convert_params

        moments = {}
        if self.calibration:
            say(f"second moments of {self.calibration} training sequences")
            moments = input_moments(run, job, self.calibration)
        made = self.model(run.cfg.model)
        params, errors = convert_params(run.params, made, self, moments)
        return params, run.state, {"errors": errors}

    def lines(self, report):
        head = f"{'layer':>5} {'op':<5} {'group':>5} {'error':>8}"
        lines = [head + (f" {'of outputs':>10}" if self.calibration else "")]
        for row in report["errors"]:
            line = "{layer:>5} {op:<5} {group:>5} {error:>8.4f}".format(**row)
            known = row["output_error"] is not None
            lines.append(line + (f" {row['output_error']:>10.4f}" if known else ""))
        return lines
