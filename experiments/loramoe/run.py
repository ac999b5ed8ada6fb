"""Does LoRAMoE keep facts that fine-tuning on a large new task destroys?

  python -m experiments.loramoe.run [--seeds=0,1,2] [--cache=DIR]

A model of 2 layers learns 500 random facts and to copy words; then each arm trains it
to translate words backwards, with 10 % of questions about 50 of the facts. Writes
results.json and plot.png next to this file, and prints the table of the README.

B batch · L length
"""

import dataclasses
import functools
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from experiments.seeds import run_seeds
from moex.adapters.lora import LoRA
from moex.adapters.loramoe import LoRAMoE
from moex.model.optim import AdamW, Optim, make_optimizer
from moex.model.paths import flat_paths, path_name
from moex.model.spec import init_guard, init_params, model_spec
from moex.nn.attention import Attention
from moex.nn.context import Compute
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.keys import Loss
from moex.tasks.lm import LanguageModelling
from moex.train.step import make_train_step

HERE = pathlib.Path(__file__).parent
TASK = LanguageModelling()
COMPUTE = Compute(kernels="xla", attention="einsum")
B, L = 64, 8
# Tokens: 50 subjects, 10 relations, 50 objects, and marks.
SUBJECT, RELATION, OBJECT = 0, 50, 60
SAY, ASK, ANSWER, COPY, TRANSLATE, TO = range(110, 116)
VOCAB, FACTS, WORD = 116, 500, 3
OTHER, KNOWLEDGE = 0, 1  # domains, which are types here
TARGETS, E, R = ("*ffn/w_*", "*attention/w_*"), 4, 4
BLOCK = 39  # steps of one compiled loop
PRETRAIN, STEPS = 20 * BLOCK, 12 * BLOCK
SAMPLES, SCORED = 15_000, 4  # of the new data; scored after every 4 blocks


def mixture(beta: float, delta: float, everywhere=False) -> LoRAMoE:
    """LoRAMoE; its constraint counts answers, or all positions of a row."""
    return LoRAMoE(
        experts=E,
        rank=R,
        alpha=8.0 * R,
        targets=TARGETS,
        types=(OTHER, KNOWLEDGE),
        beta=beta,
        delta=delta,
        count_prompts=everywhere,
        count_padding=everywhere,
    )


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train: the adapter, and the learning rate."""

    title: str
    adapter: LoRA | LoRAMoE | None
    rate: float


ARMS = {
    "base": Arm("before", None, 2e-3),
    "full": Arm("full fine-tuning", None, 2e-3),
    # A mixture weighs an expert by 1 / E at first: so this LoRA has the same scale.
    "lora": Arm("LoRA, rank 16", LoRA(rank=E * R, alpha=32.0, targets=TARGETS), 3e-3),
    "mixture": Arm("LoRAMoE, no constraint", mixture(0.0, 0.0), 3e-3),
    "lbc 0.1": Arm("LoRAMoE, delta 0.1", mixture(0.1, 0.1), 3e-3),
    "lbc 0.5": Arm("LoRAMoE, delta 0.5", mixture(0.1, 0.5), 3e-3),
    "all 0.1": Arm("delta 0.1, all positions", mixture(0.1, 0.1, True), 3e-3),
    "all 0.5": Arm("delta 0.5, all positions", mixture(0.1, 0.5, True), 3e-3),
}


def model(adapter=None) -> LM:
    dense = Segment(pattern=(Dense(hidden=256),), repeat=2)
    own = Attention(heads=4)
    return LM(dim=64, attention=own, layers=(dense,), vocab=VOCAB, adapter=adapter)


def rows(texts, answers, domain) -> dict:
    """The batch of these texts; the loss is over the last `answers` tokens of each."""
    texts = np.asarray(texts, np.int32)
    token_BL = np.zeros((len(texts), L + 1), np.int32)
    token_BL[:, : texts.shape[1]] = texts
    place_L, used = np.arange(L), texts.shape[1] - 1
    scored = (place_L < used) & (place_L >= used - answers)
    shape = (len(texts), L)
    return {
        "tokens": token_BL[:, :-1],
        "targets": token_BL[:, 1:],
        "segment": np.broadcast_to(place_L < used, shape).astype(np.int32),
        "position": np.broadcast_to(place_L, shape).astype(np.int32),
        "loss_mask": np.broadcast_to(scored, shape).astype(np.float32),
        "num_bytes": np.ones(shape, np.int32),
        "domain": np.full(len(texts), domain, np.int32),
        "example_id": np.zeros(len(texts), np.int32),
    }


def facts(rng) -> np.ndarray:
    """500 facts (subject, relation, object): every subject has every relation."""
    subject, relation = np.divmod(np.arange(FACTS), 10)
    found = rng.integers(0, 50, FACTS)
    return np.stack([SUBJECT + subject, RELATION + relation, OBJECT + found], 1)


def said(fact_N3) -> dict:
    mark = np.full((len(fact_N3), 1), SAY)
    return rows(np.concatenate([mark, fact_N3], 1), 1, KNOWLEDGE)


def asked(fact_N3) -> dict:
    ask, answer = (np.full((len(fact_N3), 1), mark) for mark in (ASK, ANSWER))
    text = [ask, fact_N3[:, :2], answer, fact_N3[:, 2:]]
    return rows(np.concatenate(text, 1), 1, KNOWLEDGE)


def words(rng, count, mark, name_O, order=1) -> dict:
    """A word of 3 objects after a mark, and each of them under its name in `name_O`.

    With order = -1 the last one comes first.
    """
    word = rng.integers(0, 50, (count, WORD))
    marks, to = np.full((count, 1), mark), np.full((count, 1), TO)
    text = [marks, OBJECT + word, to, OBJECT + name_O[word[:, ::order]]]
    return rows(np.concatenate(text, 1), WORD, OTHER)


def joined(*batches) -> dict:
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


@functools.cache
def programs(name: str):
    """(spec, optimizer, loop over `BLOCK` batches, scorer) of an arm, compiled."""
    arm = ARMS[name]
    spec = model_spec(model(arm.adapter))
    steps = PRETRAIN if name == "base" else STEPS
    optim = Optim(rule=AdamW(), lr=arm.rate, warmup_steps=20, final_lr_frac=0.05)
    tx, _ = make_optimizer(optim, steps, spec.params, spec.info)
    step = make_train_step(
        *(TASK, spec, tx, Loss()),
        grad_accum=1,
        num_domains=2,
        optim=dataclasses.replace(optim, spike_factor=None),
        compute=COMPUTE,
    )

    @jax.jit
    def loop(state, first, data, order_NB):
        def one(carry, at):
            number, index_B = at
            batch = jax.tree.map(lambda a: a[index_B], data)
            state, metrics = step(carry, number, jax.random.key(0), batch)
            return state, metrics["loss"]

        numbers = first + jnp.arange(BLOCK, dtype=jnp.int32)
        return jax.lax.scan(one, state, (numbers, order_NB))

    @jax.jit
    def score(params, batch):
        ctx = TASK.context(batch, mode="eval", compute=COMPUTE)
        own = spec.merge(params, {})
        right_BL = jnp.argmax(own(ctx)[0], -1) == batch["targets"]
        exact_B = jnp.all(right_BL | (batch["loss_mask"] == 0), axis=1)
        sums = TASK.sums(own, ctx, batch, num_domains=2)
        return exact_B, TASK.figures(sums)["adapters"]

    return spec, tx, loop, score


def train(name, params, data, steps, rng, score) -> tuple[dict, list]:
    """(parameters, scores on the way) of `steps` steps on random rows of `data`."""
    _, tx, loop, _ = programs(name)
    state = {"params": params, "state": {}, "opt": tx.init(params)}
    state["guard"] = init_guard()
    data = jax.tree.map(jnp.asarray, data)
    rounds = -(-steps * B // len(data["tokens"]))
    order = [rng.permutation(len(data["tokens"])) for _ in range(rounds)]
    order = np.concatenate(order)[: steps * B].reshape(-1, BLOCK, B)
    found = []
    for i, own in enumerate(order):
        state, _ = loop(state, np.int32(i * BLOCK), data, own)
        if (i + 1) % SCORED == 0:
            found.append({"samples": (i + 1) * BLOCK * B} | score(state["params"]))
    print(f"  {name}: {found[-1]}", flush=True)
    return state["params"], found


def first_half(figures) -> list[float] | None:
    """The mean share of the first half of the experts, for types 0 and 1."""
    if not figures:
        return None
    loads = [np.asarray(f["load_frac_YNE"]) for f in figures.values()]
    half = [load[..., : E // 2].sum(-1) for load in loads]  # [repeat, Y, N]
    both = np.concatenate([np.moveaxis(h, 1, 0).reshape(2, -1) for h in half], 1)
    return both.mean(1).tolist()


def one_seed(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    fact_N3, new_O = rng.permutation(facts(rng)), rng.permutation(50)
    kept = fact_N3[50:]  # the new data asks about the other 50 alone
    test = joined(asked(kept), words(rng, len(kept), TRANSLATE, new_O, -1))

    def score(name):
        def of(params):
            exact, figures = programs(name)[3](params, test)
            recall, task = np.asarray(exact).reshape(2, -1).mean(1).tolist()
            half = first_half(figures)
            return {"recall": recall, "task": task, "first_half": half}

        return of

    params, _ = jax.jit(lambda key: init_params(model(), key))(jax.random.key(seed))
    copies = words(rng, 8_000, COPY, np.arange(50))
    fact_rows = [said(fact_N3), asked(fact_N3)] * 8
    data = joined(copies, *fact_rows)
    base, found = train("base", params, data, PRETRAIN, rng, score("base"))
    results = {"base": found[-1:]}
    questions = fact_N3[rng.integers(0, 50, SAMPLES // 10)]
    new = words(rng, SAMPLES - len(questions), TRANSLATE, new_O, -1)
    data, own = joined(asked(questions), new), flat_paths(base)
    for name in list(ARMS)[1:]:
        fresh, _ = init_params(model(ARMS[name].adapter), jax.random.key(seed + 100))
        start = jax.tree_util.tree_map_with_path(
            lambda path, a: own.get(path_name(path), a), fresh
        )
        _, results[name] = train(name, start, data, STEPS, rng, score(name))
    return results


def table(results: dict) -> str:
    """The table of the README: the last scores, mean and deviation over seeds."""
    lines = [
        "| arm | facts recalled, % | new task, % | first half of the experts: "
        "type 0 | type 1 |",
        "|---|---|---|---|---|",
    ]
    for name, arm in ARMS.items():
        last = [seed[name][-1] for seed in results["seeds"].values()]
        cells = [_cell([100 * r[k] for r in last]) for k in ("recall", "task")]
        halves = [r["first_half"] for r in last]
        for y in (0, 1):
            cells.append("–" if halves[0] is None else _cell([h[y] for h in halves], 3))
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values, digits=1) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def plot(results: dict) -> None:
    """Draw recall and the new task over the samples, as means over seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name in list(ARMS)[1:]:
        runs = [seed[name] for seed in results["seeds"].values()]
        for axis, key in zip(axes, ("recall", "task"), strict=True):
            means = [
                100 * statistics.mean(r[key] for r in row)
                for row in zip(*runs, strict=True)
            ]
            samples = [row["samples"] for row in runs[0]]
            axis.set_xticks(samples)
            axis.plot(samples, means, marker="o", label=ARMS[name].title)
    axes[0].set(title="facts recalled", xlabel="samples seen", ylabel="%")
    axes[1].set(title="new task, exact answers", xlabel="samples seen", ylabel="%")
    axes[1].legend(fontsize=7)
    figure.savefig(HERE / "plot.png", dpi=110)


if __name__ == "__main__":
    run_seeds(__doc__, HERE, one_seed, table, plot)
