"""The same question for a language model: a sequence of runs, one for each task.

  python -m experiments.moram.sequence [--out=runs/moram]

A base learns single words; each task is an order of a few of them, which 85 % of the
words keep. The run of a task begins from the run of the task before it (`init_from`).
Runs that are already in --out are not repeated. Writes sequence.json next to this file.
"""

import argparse
import dataclasses
import json
import pathlib
import random

import jax
import numpy as np

from moex import Bytes, Data, Eval, Glu, LoRA, MoE, MoRAM, Segment, Text, TopK
from moex.analysis.continual import figures
from moex.configs import quickstart
from moex.convert.apply import convert_run
from moex.convert.kinds.folded import Folded
from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.runs.directory import RunDir
from moex.runs.score import score_run
from moex.train.training import train

HERE = pathlib.Path(__file__).parent
TASKS, WORDS, RANK = 3, 12, 8
BASE_STEPS, STEPS = 300, 150
TARGETS = ("attention", "experts/w_")
LORA = LoRA(rank=RANK, alpha=2 * RANK, targets=TARGETS)
MORAM = MoRAM(
    rank=RANK, alpha=2 * RANK, k=RANK, temperature=0.03, threshold=0.2, targets=TARGETS
)


def write_texts(folder: pathlib.Path, seed: int) -> list[pathlib.Path]:
    """Write the words in random order, then the order of each task: a file each."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = set()
    while len(words) < TASKS * WORDS:
        words.add("".join(rng.choices(letters, k=3)))
    words = sorted(words)
    rng.shuffle(words)
    own = [words[t * WORDS : (t + 1) * WORDS] for t in range(TASKS)]

    def document(kinds, order):
        kind = rng.choice(kinds)
        at = rng.randrange(WORDS)
        text = []
        for _ in range(24):
            text.append(kind[at])
            follows = order and rng.random() < 0.85
            at = order[at] if follows else rng.randrange(WORDS)
        return " ".join(text)

    paths = []
    for t in range(-1, TASKS):
        kinds = own if t < 0 else [own[t]]
        order = [] if t < 0 else rng.sample(range(WORDS), WORDS)
        path = folder / ("words.txt" if t < 0 else f"task{t}.txt")
        lines = [document(kinds, order) for _ in range(1500)]
        path.write_text("\n\n".join(lines), encoding="utf-8")
        paths.append(path)
    return paths


def data(*paths) -> Data:
    own = (Text(paths=(str(p),), name=p.stem, delimiter="\n\n") for p in paths)
    return Data(sources=tuple(own), tokenizer=Bytes())


def base_config(seed: int):
    cfg = quickstart.get_config()
    moe = MoE(num_experts=4, router=TopK(k=2), experts=Glu(hidden=64))
    cfg.model.dim, cfg.model.layers = 64, (Segment(pattern=(moe,)),)
    cfg.seed, cfg.steps, cfg.batch_size, cfg.seq_len = seed, BASE_STEPS, 16, 96
    cfg.eval = Eval(every=0, sequences=None, batch_size=16)
    cfg.checkpoint.every, cfg.log.sample_tokens = 0, 0
    cfg.log.tensorboard = cfg.log.compressors = False
    return cfg


def learn(start: pathlib.Path, out: pathlib.Path, adapter, text) -> None:
    """Train the adapter of one task from the run before it."""
    cfg = RunDir(start).config()
    cfg.model = dataclasses.replace(cfg.model, adapter=adapter)
    cfg.data, cfg.init_from, cfg.steps = data(text), str(start), STEPS
    cfg.optim = dataclasses.replace(cfg.optim, lr=5e-3, warmup_steps=10)
    train(cfg, out)


def scores(run: pathlib.Path, texts) -> list[float]:
    """The geometric mean of the probability of each byte, for each task."""
    cfg = RunDir(run).config()
    cfg.data = data(*texts)
    found = score_run(run, cfg)["domains"]
    return [float(np.exp(-found[path.stem])) for path in texts]


def sequence(kind: str, base: pathlib.Path, out: pathlib.Path, texts) -> dict:
    """Learn all tasks one after another; the matrix of scores, and the costs."""
    start, rows, costs = base, [], []
    for t, text in enumerate(texts):
        adapter = LORA
        if kind == "moram":
            adapter = dataclasses.replace(MORAM, bank=t * RANK)
        run = out / f"{kind}{t}"
        learn(start, run, adapter, text)
        rows.append(scores(run, texts))
        model = RunDir(run).config().model
        cost = model_cost(model, model_spec(model), 96)
        costs.append(
            {
                "parameters": cost.total["adapters"],
                "forward FLOPs": cost.adapter_flops,
            }
        )
        start = run
        if kind == "merged":
            start = out / f"{kind}{t}-whole"
            if not RunDir(start).is_run():
                convert_run(run, start, [Folded()], sequences=0)
    return {"scores": rows, "figures": figures(rows), "adapters of each task": costs}


def of_seed(seed: int, out: pathlib.Path) -> dict:
    """The results of one seed, whose runs are in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    words, *texts = write_texts(out, seed)
    base, cfg = out / "base", base_config(seed)
    cfg.data = data(words)
    train(cfg, base)
    results = {"base": scores(base, texts), "kinds": {}}
    for kind in ("lora", "merged", "moram"):
        results["kinds"][kind] = sequence(kind, base, out, texts)
        print(seed, kind, results["kinds"][kind], flush=True)
    return results


def table(results: list[dict]) -> str:
    """The figures in Markdown: mean ± standard deviation over seeds."""
    columns = ("learned", "last", "forgetting", "transfer", "average", "bwt")
    lines = [f"| kind | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for kind in results[0]["kinds"]:
        own = [one["kinds"][kind]["figures"] for one in results]
        cells = (np.array([figures[c] for figures in own]) for c in columns)
        told = " | ".join(f"{cell.mean():.3f} ± {cell.std():.3f}" for cell in cells)
        lines.append(f"| {kind} | {told} |")
    base = np.array([one["base"] for one in results]).mean(axis=1)
    lines.append(f"The base scores {base.mean():.3f} ± {base.std():.3f} on all tasks.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/moram"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.out / "programs"))
    results = {}
    for seed in range(args.seeds):
        results[f"seed {seed}"] = of_seed(seed, args.out.absolute() / f"seed{seed}")
    text = json.dumps(results, indent=1) + "\n"
    (HERE / "sequence.json").write_text(text, encoding="utf-8")
    print(table(list(results.values())))


if __name__ == "__main__":
    main()
