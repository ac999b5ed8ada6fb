"""The names that the parts of our adapters have in PEFT.

PEFT adapts a module (`q_proj`), or a parameter of a module (its form for stacked
experts and routers). Ours adapt a parameter, which may be stacked over layers and may
hold several projections: so an adapter of ours is many `Site`s.

I inputs · O outputs · N parts · R rank · E experts
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from moex.interop.names import Names, Piece, pieces
from moex.model.layers import layers
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.nn.lm import LM

PREFIX = "base_model.model."
# In models with experts PEFT takes these names for those of single experts; there it
# adapts the dense ones as parameters.
FUSED = ("gate_proj", "up_proj", "down_proj")
EMBED, HEAD = "embed_tokens", "lm_head"


@dataclasses.dataclass(frozen=True)
class Site:
    """One module or parameter that PEFT adapts, as a part of an adapter of ours.

    Attributes:
      module: its name in transformers.
      parameter: name of the adapted parameter of it; empty: the module is adapted.
      path: path of our parameter.
      index: where the part is in the adapter's arrays: (copy of the layer,), or ().
      part: number of the projection in our parameter.
      experts: E, if each expert has an adapter.
      inputs, outputs: I and O.
      interleaved: outputs of gate and up alternate.
      factor: ours is theirs times this, as in `Piece`.
    """

    module: str
    parameter: str
    path: str
    index: tuple[int, ...]
    part: int
    experts: int | None
    inputs: int
    outputs: int
    interleaved: bool = False
    factor: float = 1.0

    @property
    def target(self) -> str:
        """The shortest name of it that means the same module of every layer."""
        if not self.parameter:
            return self.module.rpartition(".")[2]
        inside = self.module.partition("layers.")[2].partition(".")[2]
        return f"{inside}.{self.parameter}"

    @property
    def full(self) -> str:
        """The name that means it alone."""
        return ".".join(filter(None, (self.module, self.parameter)))

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of its two tensors."""
        wide = rank * (self.experts or 1)
        return (wide, self.inputs), (self.outputs, wide)

    def tensors(
        self, a: np.ndarray, b: np.ndarray, rank: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Make the pair of tensors (A, B) of the first `rank` ranks of our arrays."""
        a, b = self._own(a, b, rank)
        if self.experts is not None:
            E = (self.experts,)  # they may share one adapter
            a_EIR = np.broadcast_to(a, E + a.shape[-3:])[:, :, 0]
            b_ERO = np.broadcast_to(b, E + b.shape[-3:])[:, 0]
            if self.interleaved:
                halves = b_ERO.reshape(*b_ERO.shape[:2], 2, -1)
                b_ERO = halves.swapaxes(2, 3).reshape(b_ERO.shape)
            own = a_EIR.swapaxes(1, 2).reshape(-1, self.inputs)
            return own, b_ERO.transpose(2, 1, 0).reshape(self.outputs, -1)
        return a[:, self.part].T, b[self.part].T / np.float32(self.factor)

    def _own(
        self, a: np.ndarray, b: np.ndarray, rank: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Views of one copy of the arrays, [..., I, N, R] and [..., N, R, O]."""
        a, b = a[self.index], b[self.index]
        b = b.reshape(*b.shape[: a.ndim - 1], -1)
        return a[..., :rank], b[..., :rank, :]

    def fill(self, a: np.ndarray, b: np.ndarray, own: np.ndarray, other: np.ndarray):
        """Undo `tensors`: write the pair (own, other) into our arrays `a` and `b`."""
        a, b = self._own(a, b, len(own) // (self.experts or 1))
        if self.experts is None:
            a[:, self.part] = own.T
            b[self.part] = other.T * np.float32(self.factor)
            return
        E, O = self.experts, self.outputs  # noqa: E741
        a[:, :, 0] = own.reshape(E, -1, self.inputs).swapaxes(1, 2)
        b_ERO = other.reshape(O, -1, E).transpose(2, 1, 0)
        if self.interleaved:
            b_ERO = b_ERO.reshape(E, -1, O // 2, 2).swapaxes(2, 3).reshape(E, -1, O)
        b[:, 0] = b_ERO


def sites(model: LM, names: Names) -> Iterator[Site]:
    """Yield all that PEFT can adapt in a model of a family."""
    blocks = list(layers(model))
    sparse = any(isinstance(site.ffn, MoE) for site, _ in blocks)
    for piece in pieces(model, names):
        matrix = len(piece.joined) == 2 and piece.name.endswith(".weight")
        if matrix and "/experts/" not in piece.path:
            yield _site(piece, names, sparse)
    for number, (site, copy) in enumerate(blocks):
        if not isinstance(site.ffn, MoE):
            continue
        assert isinstance(site.ffn.experts, Glu)
        E, F, D = site.ffn.num_experts, site.ffn.experts.hidden, model.dim
        module = f"model.layers.{number}.mlp.experts"
        for parameter, own, inputs, outputs in (
            ("gate_up_proj", "w_in_ED2F", D, 2 * F),
            ("down_proj", "w_out_EFD", F, D),
        ):
            mixed = names.experts is None and parameter == "gate_up_proj"
            path = f"{site.path}/ffn/experts/{own}"
            sizes = (E, inputs, outputs, mixed)
            yield Site(module, parameter, path, (copy,), 0, *sizes)


def _site(piece: Piece, names: Names, sparse: bool) -> Site:
    """The site of a matrix that is not an expert's; `sparse`: the model has experts."""
    dims = piece.path.rpartition("_")[2]
    copies = len(piece.index) - len(dims)
    copy, own = piece.index[:copies], piece.index[copies:]
    part = next((at for at in own if isinstance(at, int)), 0)
    module = piece.name.removesuffix(".weight")
    parameter = "weight" if sparse and module.endswith(FUSED) else ""
    if piece.path.endswith("/router/w_DE"):
        module, parameter = module.replace(f".{names.sparse}.", ".mlp."), "weight"
    outputs, inputs = piece.shape
    if module.endswith(EMBED):  # it is looked up by rows
        inputs, outputs = outputs, inputs
    index = tuple(at for at in copy if isinstance(at, int))
    sizes = (None, inputs, outputs, False, piece.factor)
    return Site(module, parameter, piece.path, index, part, *sizes)
