"""Does every kind of layer train, resume exactly and generate?

  python -m experiments.variants.run [--steps=30] [--only=ARG ...] [--out=DIR]

Each variant of configs/quickstart.py: trains, then trains its second half again from
the checkpoint in the middle, and continues a prompt. Writes results.json next to this
file; exit code 1 if a loss did not fall, a resumed run differs or nothing was written.
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import statistics
import sys
import tempfile

import jax

from benchmarks.common import environment
from moex.config.base import ConfigError
from moex.configs import quickstart
from moex.data.sources import PythonStdlib
from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.serve.text import write_text
from moex.train import training

HERE = pathlib.Path(__file__).absolute().parent
VARIANTS = (
    *("", "ffn=dense", "router=topp", "router=steered", "router=expert_choice"),
    *("router=hash", "router=soft", "router=forced", "experts=gelu", "experts=clamped"),
    *("experts=latent", "experts=lowrank", "chain=2", "chain=2,residual=released"),
    *("zero=4", "narrow=64", "shared=gated", "chain=2,match=flops"),
    "router=topp,experts=latent,chain=2,zero=4",
)


def config(arg: str, steps: int):
    """The variant, shortened; the learning rate does not depend on the length."""
    cfg = quickstart.get_config(arg)
    cfg.steps = steps
    cfg.optim.schedule = "constant"
    cfg.eval.every = 0
    cfg.data.sources = (PythonStdlib(holdout=0.004),)  # all of it is scored at the end
    cfg.checkpoint.every, cfg.checkpoint.keep = steps // 2, 3
    cfg.log.every, cfg.log.sample_tokens = 1, 0
    cfg.log.tensorboard = cfg.log.compressors = False
    return cfg


def records(workdir) -> list[dict]:
    """The training lines of metrics.jsonl without measured figures."""
    lines = map(
        json.loads, (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return [
        {k: v for k, v in line.items() if not k.startswith("perf/")}
        for line in lines
        if line["kind"] == "train"
    ]


def train(cfg, workdir):
    """Train without printing."""
    with contextlib.redirect_stdout(sys.stderr):
        return training.train(cfg, workdir, say=lambda line: None)


def variant(arg: str, steps: int, out: pathlib.Path) -> dict:
    """Train, resume and generate; returns the figures."""
    name = arg or "default"
    straight, resumed = out / name / "straight", out / name / "resumed"
    cfg = config(arg, steps)
    result = train(cfg, straight)
    speeds = [
        json.loads(line)["perf/tokens_per_s"]
        for line in (straight / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
        if '"kind": "train"' in line
    ]
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / str(steps))
    train(config(arg, steps), resumed)
    expected, actual = records(straight), records(resumed)
    cost = model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len)
    last = expected[-1]
    return {
        "variant": name,
        "params": cost.num_params,
        "active": cost.num_active,
        "nll_first_5": statistics.mean(r["nll"] for r in expected[:5]),
        "nll_last_5": statistics.mean(r["nll"] for r in expected[-5:]),
        "held_out_nll": result["eval_nll"],
        "experts_per_token": last.get("moe/experts_per_token"),
        "max_violation": last.get("moe/max_violation"),
        "tokens_per_s": statistics.median(speeds[3:]),
        "resumed_differ": sum(a != b for a, b in zip(expected, actual, strict=True)),
        "text": continued(straight),
    }


def continued(workdir) -> str:
    """The text that the model writes, or the reason why it refuses."""
    try:
        return write_text(workdir, ["def "], max_new_tokens=12, seed=0)[0]
    except ConfigError as e:
        return f"refused: {str(e).split(': ', 1)[1]}"


def table(results: list[dict]) -> str:
    """The table of the README in Markdown."""
    lines = [
        "| variant | parameters | active | first 5 | last 5 | held out | experts/token "
        "| resumed steps that differ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        experts = r["experts_per_token"]
        lines.append(
            f"| `{r['variant']}` | {r['params'] / 1e6:.2f} M "
            f"| {r['active'] / 1e6:.2f} M "
            f"| {r['nll_first_5']:.2f} | {r['nll_last_5']:.2f} "
            f"| {r['held_out_nll']:.3f} "
            f"| {'–' if experts is None else f'{experts:.2f}'} "
            f"| {r['resumed_differ']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", action="append", metavar="ARG")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the runs")
    args = parser.parse_args()
    out = args.out or pathlib.Path(tempfile.mkdtemp(prefix="variants-"))
    jax.config.update("jax_compilation_cache_dir", str(out / "programs"))
    results = []
    for arg in args.only or VARIANTS:
        results.append(variant(arg, args.steps, out))
        print(json.dumps(results[-1]), flush=True)
    print(table(results))
    if not args.only:
        data = {"steps": args.steps, "environment": environment(), "results": results}
        (HERE / "results.json").write_text(
            json.dumps(data, indent=1) + "\n", encoding="utf-8"
        )
    bad = [
        r["variant"]
        for r in results
        if r["nll_last_5"] > r["nll_first_5"] - 1
        or r["resumed_differ"]
        or not r["text"].startswith(("def ", "refused"))
    ]
    if bad:
        sys.exit(f"failed: {', '.join(bad)}")


if __name__ == "__main__":
    main()
