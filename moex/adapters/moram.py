"""MoRAM: atoms of rank 1 that route themselves, in a bank that grows with the tasks.

An atom is a key, a column of A, and a value, a row of B. Each task has new atoms; those
of the tasks before it are the bank, which is frozen. A run of the next task starts from
the run before it (`init_from`) with `bank` larger by that run's `rank`.

I inputs · O outputs · N parts · R atoms of this task · M atoms of the bank
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moex.adapters.lora import dropped, low_rank
from moex.config.base import ConfigError, require
from moex.nn.projection import Adapter, AdapterConfig, Matrix
from moex.sharding import by_rows


@dataclasses.dataclass(kw_only=True, slots=True)
class MoRAM(AdapterConfig):
    """W x + sum of w_i z_i B_i over the k of all atoms that answer x most."""

    MIXES: ClassVar[bool] = True

    rank: int  # R, atoms of this task, >= 1
    alpha: float  # the change by new atoms is multiplied by alpha / rank, > 0
    k: int  # atoms that a token uses, in 2 to bank + rank
    bank: int = 0  # M, frozen atoms of earlier tasks, >= 0
    temperature: float = 0.03  # of the softmax over scores, > 0
    # Not in training: the lowest score of an atom that is used, in (0, 1]; None: any.
    threshold: float | None = 0.2
    dropout: float = 0.0  # training: the share of inputs of A that are 0, in [0, 1)
    eps: float = 1e-12  # least norm that responses are divided by, at least 1e-18
    shared: bool = False  # stacked experts share the atoms, else each has its own

    def validate(self, path):
        require(self.rank >= 1, f"{path}.rank", self.rank, "at least 1")
        require(self.alpha > 0, f"{path}.alpha", self.alpha, "above 0")
        require(self.bank >= 0, f"{path}.bank", self.bank, "at least 0")
        told = f"at most {self.bank + self.rank}, the atoms: bank + rank"
        require(self.k <= self.bank + self.rank, f"{path}.k", self.k, told)
        told = "at least 2 (the authors' code takes 2 for less and says nothing)"
        require(self.k >= 2, f"{path}.k", self.k, told)
        require(
            self.temperature > 0, f"{path}.temperature", self.temperature, "above 0"
        )
        require(
            self.threshold is None or 0 < self.threshold <= 1,
            f"{path}.threshold",
            self.threshold,
            "in (0, 1], or None for no threshold",
        )
        require(0 <= self.dropout < 1, f"{path}.dropout", self.dropout, "in [0, 1)")
        require(self.eps >= 1e-18, f"{path}.eps", self.eps, "at least 1e-18")

    def make(self, matrix, rngs):
        return MoRAMModule(self, matrix, rngs)

    def about(self) -> str:
        return (
            f"a token scores {self.bank + self.rank} atoms at each adapted matrix "
            f"({self.bank} in the bank, {self.rank} new) and uses {self.k}"
        )

    def continued(self, before, params, path):
        params = AdapterConfig.continued(self, before, params, path)
        if before is None:
            why = "0: there is no run with MoRAM atoms that this one starts from"
            require(self.bank == 0, f"{path}.bank", self.bank, why)
            return params
        if (self.bank, self.rank) == (before.bank, before.rank):
            return params  # the same task goes on
        if self.bank != before.bank + before.rank:
            raise ConfigError(
                f"{path}.bank = {self.bank}: must be {before.bank + before.rank} for a "
                f"new task, for the run that this one starts from has bank = "
                f"{before.bank} and rank = {before.rank}; or as there, to go on with "
                "its task."
            )
        return consolidated(params, before.alpha / before.rank)


class MoRAMModule(Adapter):
    """base(x) + sum_i w_i z_i B_i over the bank and the new atoms, B_i new times scale.

    z = A x for all atoms; the scores are z over its norm; w is the softmax of the k
    highest (signed) scores over the temperature, 0 for the others. Outside of training
    an atom whose score is below the threshold has w = 0, and the others keep theirs.
    Among equal scores the first atoms are chosen, those of the bank before new ones.
    No gradient passes the choice and the threshold.

    Parameters: a_INR [I, N, R], b_NRO [N, R, *outer] with outer as in `Matrix`; frozen
    bank_a_INM [I, N, M] and bank_b_NMO [N, M, *outer] if M > 0; for stacked experts
    with a leading dim [E] unless they are shared. Without values (b = 0) new atoms
    still count in the norm and take places among the k, so the first step of a task
    is not exactly the model before it.

    Source: arXiv:2506.21035 ("Little By Little"), equations 2 to 8 of its page; its
    code for language models loses the scale of atoms in the bank, and adds random
    atoms to what it saves: not here.
    """

    def __init__(self, cfg: MoRAM, matrix: Matrix, rngs):
        super().__init__(matrix, shared=cfg.shared)
        self.num_gates = cfg.bank + cfg.rank
        self.scale, self.dropout = cfg.alpha / cfg.rank, cfg.dropout
        self.k, self.temperature = cfg.k, cfg.temperature
        self.threshold, self.eps, self.bank = cfg.threshold, cfg.eps, cfg.bank
        # Runs of a sequence may have equal seeds, but the keys of each are its own.
        rngs = nnx.Rngs(params=jax.random.fold_in(rngs.params(), cfg.bank))
        self.a_INR, self.b_NRO = low_rank(matrix, cfg.rank, rngs, shared=cfg.shared)
        if self.bank:
            self.bank_a_INM, self.bank_b_NMO = low_rank(
                matrix, cfg.bank, rngs, shared=cfg.shared, frozen=True
            )

    def __call__(self, x, base, product, ctx):
        own, M = dropped(x, self.dropout, ctx), self.bank
        z = product.inward(own, self.a_INR)
        if M:
            z = jnp.concatenate([product.inward(own, self.bank_a_INM), z], axis=-1)
        threshold = None if ctx.mode == "train" else self.threshold
        whole = product.whole(z, self)  # of the amplitudes, devices add their shares up
        w = atom_weights(whole, self.k, self.temperature, threshold, self.eps)
        used = (w * z).astype(z.dtype)
        y = base(x)
        y += self.scale * product.outward(used[..., M:], self.b_NRO).astype(y.dtype)
        if M:
            y += product.outward(used[..., :M], self.bank_b_NMO).astype(y.dtype)
        return y, w.astype(y.dtype)


def atom_weights(z, k: int, temperature: float, threshold: float | None, eps: float):
    """The weight of each atom for each row, float32 [..., atoms]; at most k are not 0.

    Args:
      z: responses of all atoms, [..., atoms].
      k: the number of atoms to choose.
      temperature: that of the softmax.
      threshold: the lowest score that keeps its weight; None: all keep theirs.
      eps: least norm that z is divided by.
    """
    z = z.astype(jnp.float32)
    square = jnp.sum(z**2, axis=-1, keepdims=True)
    s = z * jax.lax.rsqrt(jnp.maximum(square, eps**2))
    rows = jax.lax.stop_gradient(s).reshape(-1, s.shape[-1])
    chosen = by_rows(lambda rows: _highest(rows, k), rows).reshape(s.shape)
    w = jax.nn.softmax(s / temperature, axis=-1, where=chosen)
    return w if threshold is None else jnp.where(s >= threshold, w, 0.0)


def _highest(rows, k: int):
    """The mask of the k highest of each row, bool[t, atoms]; ties to the first."""
    _, place = jax.lax.top_k(rows, k)
    return jnp.put_along_axis(
        jnp.zeros(rows.shape, bool), place, True, axis=-1, inplace=False
    )


def consolidated(params: dict, scale: float) -> dict:
    """The parameters of a run with its new atoms in the bank, times their scale.

    The result has no new atoms: the next task makes its own.

    Args:
      params: nested dicts, of a model with MoRAM adapters.
      scale: alpha / rank of the new atoms.
    """
    found = {}
    for name, value in params.items():
        if name == "adapters":
            value = {matrix: _in_bank(own, scale) for matrix, own in value.items()}
        elif isinstance(value, dict):
            value = consolidated(value, scale)
        found[name] = value
    return found


def _in_bank(own: dict, scale: float) -> dict:
    a, b = [own["a_INR"]], [scale * own["b_NRO"]]
    if "bank_a_INM" in own:
        a, b = [own["bank_a_INM"], *a], [own["bank_b_NMO"], *b]
    return {
        "bank_a_INM": jnp.concatenate(a, axis=-1),
        "bank_b_NMO": jnp.concatenate(b, axis=a[0].ndim - 2),
    }
