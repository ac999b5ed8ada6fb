"""Conversions of a trained run, the tuning of their factors, and bytes on the way."""

import json
import shutil

import numpy as np

from moex.convert.apply import convert_run
from moex.convert.kinds.latent import ToLatent
from moex.model.accounting import model_cost
from moex.model.layers import sites
from moex.model.optim import Muon, Optim
from moex.model.spec import model_spec
from moex.runs.directory import RunDir
from moex.runs.score import score_run
from moex.train.training import train

SEQUENCES = 256  # held-out sequences of the report of a conversion
# The parameters that are tuned: the factors; for comparison, plain gate and up.
TUNED = {"latent": ("*/experts/a_*", "*/experts/b_*"), "plain": ("*/experts/w_in*",)}


def converted(*, seed, folder, others, options, steps):
    """Convert the plain run to latent experts, and tune the factors alone.

    Returns:
      "nll": after tuning; "converted": before it; "error": relative error of the
      weights, mean over layers, operators and groups; "tail": the most that an error
      differs from the tail of the singular values (of plain weights alone); "ratio":
      parameters of the experts over those of plain ones.
    """
    del seed
    start = RunDir(folder.path / "converted")
    if not start.conversion.is_file():
        shutil.rmtree(start.path, ignore_errors=True)  # it was cut short
        convert_run(others["plain"], start.path, [ToLatent(**options)], sequences=0)
    report = json.loads(start.conversion.read_text(encoding="utf-8"))
    sizes, rows = report["expert_params"], report["errors"]
    found = {
        "converted": _score(start),
        "error": float(np.mean([row["error"] for row in rows])),
        "ratio": sizes["after"] / sizes["before"],
        "nll": _tune(start, RunDir(folder.path / "tuned"), "latent", steps),
    }
    if not options.get("calibration"):
        found["tail"] = max(abs(row["error"] - row["tail"]) for row in rows)
    return found


def tuned(*, seed, folder, others, steps):
    """Tune gate and up of the plain run for as many steps: the control."""
    del seed
    return {"nll": _tune(others["plain"], RunDir(folder.path / "t"), "plain", steps)}


def _tune(start: RunDir, out: RunDir, kind: str, steps: int) -> float:
    """The held-out loss after tuning `TUNED[kind]` of a run alone."""
    cfg = start.config()
    cfg.init_from, cfg.steps = str(start), steps
    factors = (("*", 0.0), *((pattern, 1.0) for pattern in TUNED[kind]))
    cfg.optim = Optim(
        rule=Muon(),
        lr=5e-3,
        warmup_steps=10,
        final_lr_frac=0.0,
        lr_factors=factors,
    )
    cfg.checkpoint.every = 0
    train(cfg, out)
    return _score(out)


def _score(run: RunDir) -> float:
    """The loss of all held-out text."""
    return score_run(run, run.config())["nll"]


def traffic(*, seed, folder, others, name, arm):
    """Bytes of a token's rows to its experts and back, of one layer.

    A slot's row goes to the device of its expert and comes back, in bfloat16, unless it
    is one of the sender's own: with 8 devices 7 of 8 do.

    Returns:
      "bytes": per token; "bank": parameters of all experts of the model.
    """
    from experiments.latent_experts import config  # which imports this file

    del seed, folder, others
    cfg = config.config(name, *config.kinds(name)[arm])
    cfg.model.vocab = 1024
    sparse = next(site.sparse for site in sites(cfg.model) if site.sparse is not None)
    cost = model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len)
    slots = config.SIZES[name].k
    return {
        "bytes": 2 * 2 * slots * sparse.width * 7 / 8,
        "bank": cost.total["experts"],
    }
