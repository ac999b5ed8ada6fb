"""How much does a trained MoE lose as latent experts, and does tuning give it back?

  python -m experiments.latent_conversion.run [--out=DIR]

Trains a small MoE on the quickstart's data, converts it with groups of 2, 4 and 8
experts, by the weights and whitened, and tunes the factors alone. Runs that are already
in --out are not repeated. Writes results.json next to this file.
"""

import argparse
import json
import pathlib

import jax
import ml_collections

from moex.configs import quickstart
from moex.convert.apply import convert_run
from moex.convert.kinds.latent import ToLatent
from moex.model.optim import Muon, Optim
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.stack import Segment
from moex.runs.directory import RunDir
from moex.runs.keys import Eval
from moex.runs.score import score_run
from moex.train.training import train

HERE = pathlib.Path(__file__).parent
GROUPS = (2, 4, 8)
STEPS, TUNE_STEPS = 500, 100
SEQUENCES = 256  # held-out sequences that every loss is over
# The parameters that are tuned: the factors; for comparison, plain gate and up.
TUNED = {"latent": ("*/experts/a_*", "*/experts/b_*"), "plain": ("*/experts/w_in*",)}


def base_config() -> ml_collections.ConfigDict:
    cfg = quickstart.get_config()
    moe = MoE(num_experts=8, router=TopK(k=2), experts=Glu(hidden=32))
    cfg.model.layers = (Segment(pattern=(moe,), repeat=2),)
    cfg.steps, cfg.batch_size = STEPS, 8
    return quiet(cfg)


def quiet(cfg):
    cfg.eval = Eval(every=0, sequences=SEQUENCES, batch_size=16)
    cfg.checkpoint.every = 0
    cfg.log.sample_tokens = 0
    cfg.log.tensorboard = False
    cfg.log.compressors = False
    return cfg


def tune(start: pathlib.Path, out: pathlib.Path, kind: str) -> float:
    """Held-out loss after tuning only `TUNED[kind]` of the run `start`."""
    cfg = RunDir(start).config()
    cfg.init_from, cfg.steps = str(start), TUNE_STEPS
    cfg.optim = Optim(
        rule=Muon(),
        lr=5e-3,
        warmup_steps=10,
        final_lr_frac=0.0,
        lr_factors=(("*", 0.0), *((pattern, 1.0) for pattern in TUNED[kind])),
    )
    train(cfg, out)
    return score(out)


def score(run: pathlib.Path) -> float:
    return score_run(run, RunDir(run).config(), sequences=SEQUENCES)["nll"]


def converted(base, out, **options) -> dict:
    """The report of a conversion to `out`, made now or before."""
    if (out / "convert.json").is_file():
        return json.loads((out / "convert.json").read_text(encoding="utf-8"))
    return convert_run(base, out, [ToLatent(**options)], sequences=SEQUENCES)


def row(base, out, group: int, calibration: int) -> dict:
    """One row of the table: convert, then tune."""
    name = f"group{group}" + ("-whiten" if calibration else "")
    report = converted(base, out / name, group=group, calibration=calibration)
    sizes = report["expert_params"]
    errors = [r["error"] for r in report["errors"]]
    gaps = [abs(r["error"] - r["tail"]) for r in report["errors"]]
    return {
        "group": group,
        "whiten": bool(calibration),
        "ratio": sizes["after"] / sizes["before"],
        "mean_error": sum(errors) / len(errors),
        "max_error_minus_tail": None if calibration else max(gaps),
        "converted": report["loss"]["after"],
        "tuned": tune(out / name, out / f"{name}-tuned", "latent"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/latent"))
    out = parser.parse_args().out.absolute()
    # The two conversions of a group share their compiled programs.
    jax.config.update("jax_compilation_cache_dir", str(out / "programs"))
    base = out / "base"
    train(base_config(), base)
    results = {
        "device": f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)",
        "seed": 0,
        "original": score(base),
        "original_tuned": tune(base, out / "base-tuned", "plain"),
        # One direction for all experts: this is the most that can be lost.
        "latent1": converted(base, out / "latent1", group=8, latent=1)["loss"]["after"],
        "rows": [],
    }
    for group in GROUPS:
        for calibration in (0, SEQUENCES):
            results["rows"].append(row(base, out, group, calibration))
            print(results["rows"][-1], flush=True)
    (HERE / "results.json").write_text(
        json.dumps(results, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
