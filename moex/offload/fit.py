"""Training a predictor of experts on a trace, and how many experts it finds.

N tokens · R routers · E experts, the most of a layer · K slots
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moex.analysis.trace import Trace
from moex.config.base import ConfigError, require
from moex.offload.predictor import About, Predictor, windows
from moex.offload.routes import Routes, read_routes
from moex.progress import counted

HELD_OUT = 10  # of so many examples the last one is held out
NAMES = ("predicted", "popular", "previous")  # columns of the table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a predictor is trained: AdamW with a cosine schedule."""

    steps: int = 600
    batch: int = 256  # tokens
    lr: float = 3e-3
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


def fit(
    trace: Trace,
    training: Training = Training(),
    *,
    routes: Routes | None = None,
    **sizes,
) -> Predictor:
    """Train a predictor on most examples of a trace, and measure it on the others.

    Args:
      trace: open.
      training: `Training`.
      routes: those of the trace to use; None: all.
      sizes: fields of `About`.

    Raises:
      ConfigError: if the trace has fewer than two examples, or the loss is not finite.
    """
    routes = read_routes(trace) if routes is None else routes
    if routes.num_examples < 2:
        raise ConfigError(f"{trace.path}: one example is too few to hold one out.")
    about = About.of(trace.header, **sizes)
    profile, held_out = split(routes)
    predictor = Predictor.fresh(about, training.seed)
    predictor.params = _trained(predictor, profile, training)
    predictor.recall = {
        "held_out_tokens": len(held_out),
        "by_layer": dict(
            zip(trace.layers, recalls(predictor, profile, held_out), strict=True)
        ),
    }
    return predictor


def split(routes: Routes) -> tuple[Routes, Routes]:
    """The examples to learn from and those to measure by: every tenth, or the last."""
    every = min(HELD_OUT, routes.num_examples)
    held_N = routes.example_N % every == every - 1
    return routes.tokens(~held_N), routes.tokens(held_N)


def _trained(predictor: Predictor, routes: Routes, how: Training) -> dict[str, Any]:
    token_NH = windows(routes, predictor.about)
    schedule = optax.cosine_decay_schedule(how.lr, how.steps)
    optimizer = optax.adamw(schedule, weight_decay=how.weight_decay)
    E = routes.num_experts
    there_RE = np.arange(E) < np.array(routes.experts_R)[:, None]

    def loss_of(params, token_BH, expert_BRK):
        # The row of -1 is 0.
        chosen_BRE = jax.nn.one_hot(expert_BRK, E).sum(2)
        logits_BRE = predictor.apply(params, token_BH)
        loss_BRE = optax.sigmoid_binary_cross_entropy(logits_BRE, chosen_BRE)
        return jnp.mean(loss_BRE, where=there_RE[None])

    @jax.jit
    def step(params, state, token_BH, expert_BRK):
        loss, grads = jax.value_and_grad(loss_of)(params, token_BH, expert_BRK)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, rng = predictor.params, np.random.default_rng(how.seed)
    state, loss = optimizer.init(params), jnp.zeros(())
    for _ in counted(range(how.steps), "training the predictor", how.steps, "steps"):
        rows = rng.integers(0, len(routes), how.batch)
        params, state, loss = step(
            params, state, token_NH[rows], routes.expert_NRK[rows]
        )
    if not np.isfinite(float(loss)):
        raise ConfigError(
            f"training the predictor: the loss became {float(loss)}; lower lr, "
            f"{how.lr:g}."
        )
    return jax.tree.map(np.asarray, params)


def recalls(predictor: Predictor, profile: Routes, held_out: Routes) -> list[dict]:
    """The share of needed experts that are found, for each router.

    Each way names as many experts as the router has slots: "predicted"; "popular", the
    most frequent of the profile; "previous", those of the token before in its document.
    """
    about, ids_NRK = predictor.about, held_out.expert_NRK
    parts = np.array_split(windows(held_out, about), len(held_out) // 4096 + 1)
    predicted_NRK = np.concatenate([predictor.experts(part) for part in parts])
    previous_NRK = np.roll(ids_NRK, 1, axis=0)
    first_N = np.diff(held_out.document_N, prepend=-1) != 0
    previous_NRK = np.where(first_N[:, None, None], -1, previous_NRK)
    found = []
    for r, slots in enumerate(about.slots):
        ids = profile.expert_NRK[:, r]
        count_E = np.bincount(ids[ids >= 0], minlength=held_out.num_experts)
        popular_K = np.argsort(-count_E, kind="stable")[:slots]
        popular_NK = np.broadcast_to(popular_K, (len(ids_NRK), slots))
        ways = predicted_NRK[:, r], popular_NK, previous_NRK[:, r]
        recall = [_recall(way_NK, ids_NRK[:, r]) for way_NK in ways]
        found.append(dict(zip(NAMES, recall, strict=True)) | {"experts": slots})
    return found


def _recall(named_NK, needed_NK) -> float:
    needed = needed_NK >= 0
    same = (named_NK[:, None, :] == needed_NK[:, :, None]).any(2) & needed
    return float(same.sum() / max(needed.sum(), 1))


def table(recall: dict[str, Any]) -> list[str]:
    """The lines of a measured recall."""
    rows = recall["by_layer"]
    lines = [
        f"found of the needed experts, {recall['held_out_tokens']:,} held-out tokens",
        f"{'layer':>7} {'named':>6} " + " ".join(f"{n:>10}" for n in NAMES),
    ]
    for label, row in rows.items():
        values = " ".join(f"{row[name]:>10.1%}" for name in NAMES)
        lines.append(f"{label:>7} {row['experts']:>6} {values}")
    means = (sum(row[name] for row in rows.values()) / len(rows) for name in NAMES)
    lines.append(f"{'mean':>7} {'':>6} " + " ".join(f"{m:>10.1%}" for m in means))
    return lines
