"""Does scaling the gates of two experts make a model that stops too early think longer?

  python -m experiments.steering.run [--seeds=0,1,2] [--cache=DIR]

A model of 4 MoE layers learns to add 8 digits step by step, from texts of which half
stop early. Experts are chosen by nPMI with a marker (RICE) or by risk difference
(SteerMoE), and steered while the model writes. Writes results.json and plot.png next to
this file, and prints the tables of the README.

B batch · L length · N tokens
"""

import dataclasses
import functools
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from experiments.seeds import run_seeds
from moex.analysis import marking
from moex.analysis.markers import Marker, MarkerFinder
from moex.analysis.record import (
    TokenCounter,
    layer_infos,
    routed_layers,
    slots_by_layer,
)
from moex.analysis.trace import Chunk
from moex.model.decode import generate
from moex.model.optim import AdamW, Optim, make_optimizer
from moex.model.spec import init_guard, init_params, model_spec
from moex.model.steering import LayerSteering, Steering
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.context import Compute
from moex.nn.lm import LM
from moex.nn.stack import Segment
from moex.runs.keys import Loss
from moex.tasks.lm import LanguageModelling
from moex.train.step import make_train_step

HERE = pathlib.Path(__file__).parent
TASK = LanguageModelling()
COMPUTE = Compute()
VOCABULARY = (*"0123456789", "<think>", "</think>", "<end>", "<pad>")
THINK, STOP, END, PAD = range(10, 14)
DIGITS, B, L = 8, 24, 20
LAYERS, EXPERTS = 4, 16
BLOCK, STEPS = 100, 2000
# Texts to find experts in, to score, to score for each expert alone; new tokens.
TRACED, WRITTEN, ALONE, NEW = 1000, 3000, 500, 12
TOP = 2  # experts that are steered
DOSES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 64.0)
RANDOM_PAIRS, DOSE = 8, 4.0
MARKERS = {
    "literal": (Marker("<think>"), Marker("</think>")),
    "span": (Marker("<think>", "</think>"), Marker("</think>")),
}


def model() -> LM:
    moe = MoE(num_experts=EXPERTS, router=TopK(k=2), experts=Glu(hidden=48))
    layers = (Segment(pattern=(moe,), repeat=LAYERS),)
    return LM(dim=48, attention=Attention(heads=4), layers=layers, vocab=14)


MODEL = model()
SPEC = model_spec(MODEL)


def texts(rng, count, steps_B) -> np.ndarray:
    """int32[count, L + 1]: digits, their running sums modulo 10, the last of them.

    Args:
      steps_B: how many sums each text has.
    """
    digit_BD = rng.integers(0, 10, (count, DIGITS))
    return written(digit_BD, steps_B)


def written(digit_BD, steps_B) -> np.ndarray:
    sum_BD = np.cumsum(digit_BD, axis=1) % 10
    text_BL = np.full((len(digit_BD), L + 1), PAD, np.int32)
    for text, digits, sums, n in zip(text_BL, digit_BD, sum_BD, steps_B, strict=True):
        own = [*digits, THINK, *sums[:n], STOP, sums[n - 1], END]
        text[: len(own)] = own
    return text_BL


def batch_of(text_BL) -> dict:
    """A batch of texts; the loss is over what follows <think>."""
    text_BL = np.asarray(text_BL, np.int32)
    shape = (len(text_BL), L)
    real_BL = (text_BL[:, :-1] != PAD) & (text_BL[:, :-1] != END)
    place_BL = np.broadcast_to(np.arange(L), shape)
    return {
        "tokens": text_BL[:, :-1],
        "targets": text_BL[:, 1:],
        "segment": real_BL.astype(np.int32),
        "position": place_BL.astype(np.int32),
        "loss_mask": (real_BL & (place_BL >= DIGITS)).astype(np.float32),
        "num_bytes": np.ones(shape, np.int32),
        "domain": np.zeros(len(text_BL), np.int32),
        "example_id": np.zeros(len(text_BL), np.int32),
    }


@functools.cache
def programs():
    """(optimizer, loop over `BLOCK` batches, routing of a batch), compiled."""
    optim = Optim(rule=AdamW(), lr=3e-3, schedule="cosine", warmup_steps=100)
    tx, _ = make_optimizer(optim, STEPS, SPEC.params, SPEC.info)
    step = make_train_step(
        *(TASK, SPEC, tx, Loss(load_balance=0.01)),
        grad_accum=1,
        num_domains=1,
        optim=dataclasses.replace(optim, spike_factor=None),
        compute=COMPUTE,
    )

    @jax.jit
    def loop(state, first, batches):
        def one(carry, at):
            number, batch = at
            state, metrics = step(carry, number, jax.random.key(0), batch)
            return state, metrics["loss"]

        numbers = first + jnp.arange(BLOCK, dtype=jnp.int32)
        return jax.lax.scan(one, state, (numbers, batches))

    @jax.jit
    def routed(params, batch):
        ctx = TASK.context(batch, mode="eval", collect=True, compute=COMPUTE)
        return routed_layers(SPEC.merge(params, {})(ctx)[1])

    @jax.jit
    def logits(params, batch, steer):
        ctx = TASK.context(batch, mode="eval", compute=COMPUTE, steer=steer)
        return SPEC.merge(params, {})(ctx)[0]

    return tx, loop, routed, logits


def early(rng, count) -> np.ndarray:
    """The number of sums of each text: all of them in half, else 1 to 7."""
    short_B = rng.random(count) < 0.5
    return np.where(short_B, rng.integers(1, DIGITS, count), DIGITS)


def train(rng, seed):
    tx, loop, *_ = programs()
    params, _ = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(seed))
    state = {"params": params, "state": {}, "opt": tx.init(params)}
    state["guard"] = init_guard()
    for first in range(0, STEPS, BLOCK):
        rows = batch_of(texts(rng, BLOCK * B, early(rng, BLOCK * B)))
        batches = {k: v.reshape(BLOCK, B, *v.shape[1:]) for k, v in rows.items()}
        state, loss = loop(state, np.int32(first), batches)
    print(f"  loss {float(loss[-20:].mean()):.4f}", flush=True)
    return state["params"]


def write(params, digit_BD, seed, steering: Steering | None) -> tuple[list, float]:
    """(new tokens of each text, largest residual) of the steered model."""
    peaks: list[float] = []
    prompts = [[*map(int, digits), THINK] for digits in digit_BD]
    new = generate(
        *(SPEC, MODEL, params, {}, prompts),
        max_new_tokens=NEW,
        temperature=1.0,
        seed=seed,
        stop_tokens=[END],
        steer=None if steering is None else steering.arrays(MODEL),
        on_peak=peaks.append,
        compute=COMPUTE,
    )
    return new, max(peaks, default=0.0)


def score(digit_BD, new) -> dict:
    """Mean number of sums, and the shares of right answers and of well-formed texts."""
    lengths, right, formed = [], [], []
    for digits, own in zip(digit_BD, new, strict=True):
        n = own.index(STOP) if STOP in own else len(own)
        answer = own[n + 1 :]
        ok = len(answer) == 1 and max([*own[:n], *answer]) < 10
        lengths.append(n)
        formed.append(ok)
        right.append(ok and answer[0] == digits.sum() % 10)
    means = (float(np.mean(x)) for x in (lengths, right, formed))
    return dict(zip(("length", "accuracy", "formed"), means, strict=True))


def counts(params, text_BL, markers=()) -> dict[int, marking.Counts]:
    """Counts of the experts in texts, from <think> on."""
    _, _, routed, _ = programs()
    counter, chunks = TokenCounter(), []
    for rows in np.split(text_BL, len(text_BL) // 250):
        batch = batch_of(rows)
        valid_T, tokens = counter(batch)
        arrays = jax.device_get(routed(params, batch))
        slots = slots_by_layer(MODEL, arrays, valid_T)
        chunks.append(Chunk(tokens=tokens, layers=slots))
    finder = MarkerFinder(markers, VOCABULARY, "the texts", start="<think>")
    return marking.count_chunks(layer_infos(MODEL), chunks, finder)


def padded(digit_BD, new) -> np.ndarray:
    text_BL = np.full((len(new), L + 1), PAD, np.int32)
    for text, digits, own in zip(text_BL, digit_BD, new, strict=True):
        whole = [*digits, THINK, *own, END][: L + 1]
        text[: len(whole)] = whole
    return text_BL


def pair(steering: Steering) -> list[str]:
    """The experts that are steered, as layer/number, those that are banned with -."""
    return [
        text
        for own in steering.layers
        for text in (
            *(f"{own.layer}/{e}" for e in (*own.scale, *own.force)),
            *(f"-{own.layer}/{e}" for e in own.ban),
        )
    ]


def random_pair(rng, factor) -> Steering:
    chosen = rng.choice(LAYERS * EXPERTS, TOP, replace=False)
    found: dict[int, dict[int, float]] = {}
    for i in sorted(chosen.tolist()):
        found.setdefault(i // EXPERTS, {})[i % EXPERTS] = factor
    layers = (LayerSteering(layer=n, scale=scale) for n, scale in found.items())
    return Steering(layers=tuple(layers))


def same_bits(params, digit_BD) -> bool:
    """Whether a factor of 1 leaves the logits as they are, bit for bit."""
    *_, logits = programs()
    batch = batch_of(written(digit_BD[:64], [DIGITS] * 64))
    ones = Steering(layers=(LayerSteering(layer=0, scale={0: 1.0}),)).arrays(MODEL)
    one, other = logits(params, batch, None), logits(params, batch, ones)
    return bool(np.array_equal(one, other))


def one_seed(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    params = train(rng, seed)
    traced_BD = rng.integers(0, 10, (TRACED, DIGITS))
    digit_BD = rng.integers(0, 10, (WRITTEN, DIGITS))
    first, _ = write(params, traced_BD, seed, None)
    text_BL = padded(traced_BD, first)

    def steered(steering):
        new, peak = write(params, digit_BD, seed + 1, steering)
        return score(digit_BD, new) | {"peak": peak}

    results: dict = {"base": steered(None), "same_bits": same_bits(params, digit_BD)}
    print(f"  base: {results['base']}", flush=True)
    for name, markers in MARKERS.items():
        own = counts(params, text_BL, markers)
        found = marking.marker_scores(own, markers, (1.0, -1.0))
        rows = {b: steered(marking.scaled(found, TOP, b)) for b in DOSES}
        experts = pair(marking.scaled(found, TOP, 1.0))
        results[name] = {"experts": experts, "doses": rows}
        print(f"  {name} {experts}: {rows[DOSE]}", flush=True)
    pairs = [random_pair(rng, DOSE) for _ in range(RANDOM_PAIRS)]
    results["random"] = [{"experts": pair(p)} | steered(p) for p in pairs]
    # SteerMoE: the same prompts, with all sums and with too few of them.
    long_BL = written(traced_BD, [DIGITS] * TRACED)
    short_BL = written(traced_BD, rng.integers(1, DIGITS, TRACED))
    risk = marking.risk_scores(counts(params, long_BL), counts(params, short_BL))
    results["steermoe"] = {
        str(top): {"experts": pair(p)} | steered(p)
        for top in (1, 2, 4)
        for p in [marking.switched(risk, top)]
    }
    print(f"  steermoe: {results['steermoe']}", flush=True)
    results["alone"] = alone(params, digit_BD[:ALONE], seed + 1, text_BL)
    return results


def alone(params, digit_BD, seed, text_BL) -> dict:
    """Length and accuracy when one expert is scaled by `DOSE`, and its span score.

    Every expert of the model is scaled in turn, so this tells whether high scores go
    with long texts, whichever pair is the best.
    """

    def steered(steering):
        return score(digit_BD, write(params, digit_BD, seed, steering)[0])

    own = counts(params, text_BL, MARKERS["span"])
    found = marking.marker_scores(own, MARKERS["span"], (1.0, -1.0), 0.0)
    rows = []
    for layer, score_E in found.items():
        for e, value in enumerate(score_E):
            one = LayerSteering(layer=layer, scale={e: DOSE})
            row = {"expert": f"{layer}/{e}", "score": float(value)}
            rows.append(row | steered(Steering(layers=(one,))))
    return {"base": steered(None), "experts": rows}


def rank_correlation(x, y) -> float:
    """Spearman's correlation; of equal numbers the first ranks lower."""
    ranks = [np.argsort(np.argsort(v, kind="stable"), kind="stable") for v in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def gains(seed: dict, name: str) -> dict[str, float]:
    """The gain of the dose `DOSE` over 1, and the same of random pairs."""
    doses = {float(b): row for b, row in seed[name]["doses"].items()}
    found = {}
    for key in ("length", "accuracy"):
        found[key] = doses[DOSE][key] - doses[1.0][key]
        others = [row[key] - doses[1.0][key] for row in seed["random"]]
        found[f"{key}_mean"] = statistics.mean(others)
        found[f"{key}_deviation"] = statistics.stdev(others)
        found[f"{key}_most"] = max(others)
    return found


def verdicts(seed: dict) -> dict[str, bool]:
    """The criteria for the span marker."""
    doses = {float(b): row for b, row in seed["span"]["doses"].items()}
    lengths = [doses[b]["length"] for b in (0.0, 1.0, 2.0, 4.0)]
    own = gains(seed, "span")
    return {
        "length grows with the dose": all(np.diff(lengths) > 0),
        "3 deviations over random pairs": own["length"] - own["length_mean"]
        >= 3 * own["length_deviation"],
        "accuracy + 0.02": own["accuracy"] >= 0.02,
        "well-formed >= 0.98": doses[DOSE]["formed"] >= 0.98,
        "1 is bit-identical": seed["same_bits"],
        "64 is clearly worse": doses[64.0]["accuracy"] < doses[1.0]["accuracy"] - 0.05,
    }


def table(results: dict) -> str:
    """The tables of the README: doses, gains and criteria for each seed."""
    seeds = results["seeds"]
    lines = []
    for name in MARKERS:
        head = " | ".join(f"{b:g}" for b in DOSES)
        lines += [f"{name} marker:", "", f"| seed | experts | {head} |"]
        lines.append("|---" * (2 + len(DOSES)) + "|")
        for number, seed in seeds.items():
            rows = {float(b): row for b, row in seed[name]["doses"].items()}
            cells = [
                f"{rows[b]['length']:.2f}, {rows[b]['accuracy']:.3f}" for b in DOSES
            ]
            experts = ", ".join(seed[name]["experts"])
            lines.append(f"| {number} | {experts} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| seed | what | length | accuracy | well-formed | largest residual |"]
    lines.append("|---" * 6 + "|")
    for number, seed in seeds.items():
        rows = {"base": seed["base"]}
        for name in MARKERS:
            doses = {float(b): row for b, row in seed[name]["doses"].items()}
            rows |= {f"{name} x {b:g}": doses[b] for b in (DOSE, 64.0)}
        rows |= {
            f"SteerMoE, {', '.join(row['experts'])}": row
            for row in seed["steermoe"].values()
        }
        for what, row in rows.items():
            cells = f"{row['length']:.2f} | {row['accuracy']:.3f} | {row['formed']:.3f}"
            peak = f"{row['peak']:.0f}" if row["peak"] else "–"
            lines.append(f"| {number} | {what} | {cells} | {peak} |")
    lines += [
        "",
        "| seed | gain of length | of random pairs | of accuracy | of random |",
    ]
    lines.append("|---" * 5 + "|")
    for number, seed in seeds.items():
        own = gains(seed, "span")
        cells = []
        for key in ("length", "accuracy"):
            spread = f"{own[f'{key}_mean']:+.3f} ± {own[f'{key}_deviation']:.3f}"
            most = f"{own[f'{key}_most']:+.3f}"
            cells += [f"{own[key]:+.3f}", f"{spread}, most {most}"]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    lines += ["", "| seed | rank correlation | longest | shortest | highest score |"]
    lines.append("|---" * 5 + "|")
    for number, seed in seeds.items():
        rows, base = seed["alone"]["experts"], seed["alone"]["base"]
        lengths = [row["length"] for row in rows]
        values = [row["score"] for row in rows]
        picked = (np.argmax(lengths), np.argmin(lengths), np.argmax(values))
        cells = []
        for i in picked:
            gain = lengths[i] - base["length"]
            right = rows[i]["accuracy"] - base["accuracy"]
            cells.append(f"{rows[i]['expert']}: {gain:+.2f}, accuracy {right:+.3f}")
        rho = rank_correlation(values, lengths)
        lines.append(f"| {number} | {rho:+.2f} | {' | '.join(cells)} |")
    names = list(verdicts(next(iter(seeds.values()))))
    lines += ["", f"| seed | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for number, seed in seeds.items():
        cells = ["yes" if ok else "no" for ok in verdicts(seed).values()]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict) -> None:
    """Draw length and accuracy over the dose, each seed a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for color, name in zip(("tab:blue", "tab:orange"), MARKERS, strict=True):
        for i, seed in enumerate(results["seeds"].values()):
            rows = {float(b): row for b, row in seed[name]["doses"].items()}
            shown = [b for b in DOSES if b <= 8]
            for axis, key in zip(axes, ("length", "accuracy"), strict=True):
                values = [rows[b][key] for b in shown]
                label = f"{name} marker" if i == 0 else None
                axis.plot(shown, values, marker="o", color=color, label=label)
    for i, seed in enumerate(results["seeds"].values()):
        for axis, key in zip(axes, ("length", "accuracy"), strict=True):
            values = [row[key] for row in seed["random"]]
            label = "random pairs" if i == 0 else None
            axis.plot([DOSE] * len(values), values, "x", color="gray", label=label)
    axes[0].set(title="sums written (of 8)", xlabel="factor of the gates")
    axes[1].set(title="right answers", xlabel="factor of the gates")
    axes[0].legend(fontsize=7)
    figure.savefig(HERE / "plot.png", dpi=110)


if __name__ == "__main__":
    run_seeds(__doc__, HERE, one_seed, table, plot)
