"""Which tensor of a checkpoint folder is which slice of which moex parameter.

Everything that differs between the names of families is in `Names`; shapes follow from
the model config. A tensor maps to ours by a reshape and a transpose, so both ways are
exact.

R copies of a layer · D model width · H query heads · G key/value heads · A head width
· E experts · F expert width · V vocabulary
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from moex.model.layers import layers
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense

EVERYTHING = slice(None)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of a folder as a slice of one of our arrays.

    ours[index] == theirs.reshape(split).transpose(order) * factor

    Attributes:
      name, shape: the name and the shape of the tensor in the folder.
      path: path of our parameter, or router state, as `flat_paths` has it.
      index: into our array; the first entry is the copy of a stacked layer.
      split: a shape of as many elements in the same order.
      order: axes of `split` as ours has them.
      factor: factor on the numbers of the folder; 1 for every imported tensor.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int | slice, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Names of a family inside of a layer, where they differ.

    Attributes:
      sparse: the name of the feed-forward in sparse layers.
      router: the name of the router in it.
      experts: gate, up and down of one expert; None: all experts in three tensors
        with gate and up mixed (GPT-OSS).
    """

    sparse: str = "mlp"
    router: str = "gate"
    experts: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")


def pieces(model: LM, names: Names) -> Iterator[Piece]:
    """Yield every tensor of a checkpoint of this model, in the order of the layers."""
    V, D = model.vocab, model.dim
    assert V is not None
    # Families do not scale embeddings; a model that does leaves with scaled rows.
    factor = D**-0.5 if model.scale_embeddings else 1.0
    yield Piece(
        "model.embed_tokens.weight",
        *((V, D), "w_embed_VD", ()),
        *((V, D), (0, 1), factor),
    )
    for number, (site, r) in enumerate(layers(model)):
        make = _Layer(f"model.layers.{number}", site.path, r)
        yield from make.block(site.attention, site.ffn, D, names)
    yield Piece("model.norm.weight", (D,), "norm/scale_D", (), (D,), (0,))
    if not model.tied_embeddings:
        yield Piece("lm_head.weight", (V, D), "w_logits_DV", (), (V, D), (1, 0))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Makes the pieces of one layer: names and paths below these, copy r."""

    theirs: str
    ours: str
    r: int

    def piece(self, name, path, split, order, index=(), shape=None) -> Piece:
        """A piece; `shape` is None where no dims of `split` are joined."""
        shape = tuple(split) if shape is None else shape
        assert math.prod(shape) == math.prod(split)
        own = (self.r, *index)
        name, path = f"{self.theirs}.{name}", f"{self.ours}/{path}"
        return Piece(name, shape, path, own, tuple(split), order)

    def vector(self, name, path, width, index=()) -> Piece:
        return self.piece(name, path, (width,), (0,), index)

    def block(self, attention: Any, ffn: Any, D, names) -> Iterator[Piece]:
        yield self.vector("input_layernorm.weight", "norm_attention/scale_D", D)
        if isinstance(attention, Attention):
            yield from self.attention(attention, D)
        else:
            yield from self.latent_attention(attention, D)
        yield self.vector("post_attention_layernorm.weight", "norm_ffn/scale_D", D)
        if isinstance(ffn, Dense):
            yield from self.dense("mlp", "ffn", ffn.hidden, D)
        else:
            yield from self.moe(ffn, D, names)

    def attention(self, cfg: Attention, D) -> Iterator[Piece]:
        G, A = cfg.kv_heads or cfg.heads, cfg.width(D)
        R = cfg.heads // G
        at, to = "self_attn", "attention"
        yield self.piece(
            f"{at}.q_proj.weight",
            f"{to}/w_q_DGRA",
            (G, R, A, D),
            (3, 0, 1, 2),
            shape=(G * R * A, D),
        )
        for i, name in enumerate("kv"):
            yield self.piece(
                f"{at}.{name}_proj.weight",
                f"{to}/w_kv_D2GA",
                (G, A, D),
                (2, 0, 1),
                (EVERYTHING, i),
                (G * A, D),
            )
        yield self.piece(
            f"{at}.o_proj.weight",
            f"{to}/w_out_GRAD",
            (D, G, R, A),
            (1, 2, 3, 0),
            shape=(D, G * R * A),
        )
        if cfg.bias:
            yield self.piece(
                f"{at}.q_proj.bias",
                f"{to}/bias_q_GRA",
                (G, R, A),
                (0, 1, 2),
                shape=(G * R * A,),
            )
            for i, name in enumerate("kv"):
                yield self.piece(
                    f"{at}.{name}_proj.bias",
                    f"{to}/bias_kv_2GA",
                    (G, A),
                    (0, 1),
                    (i,),
                    (G * A,),
                )
            yield self.vector(f"{at}.o_proj.bias", f"{to}/bias_out_D", D)
        if cfg.qk_norm:
            for name, heads in (("q", G * R), ("k", G)):
                width = heads * A if cfg.qk_norm == "whole" else A
                path = f"{to}/norm_{name}/scale_D"
                yield self.vector(f"{at}.{name}_norm.weight", path, width)
        if cfg.sinks:
            yield self.piece(
                f"{at}.sinks", f"{to}/sink_GR", (G, R), (0, 1), shape=(G * R,)
            )

    def latent_attention(self, cfg: LatentAttention, D) -> Iterator[Piece]:
        H, Z, Q = cfg.heads, cfg.kv_latent, cfg.q_latent
        C, P, U = cfg.nope_dim + cfg.rope_dim, cfg.rope_dim, cfg.v_dim
        at, to = "self_attn", "attention"

        def heads(name, path, width, inputs):
            shape = (H * width, inputs)
            return self.piece(
                f"{at}.{name}.weight",
                f"{to}/{path}",
                (H, width, inputs),
                (2, 0, 1),
                shape=shape,
            )

        if Q is None:
            yield heads("q_proj", "w_q_DHC", C, D)
        else:
            yield self.matrix(f"{at}.q_a_proj.weight", f"{to}/w_qa_DQ", Q, D)
            yield self.vector(f"{at}.q_a_layernorm.weight", f"{to}/norm_q/scale_D", Q)
            yield heads("q_b_proj", "w_qb_QHC", C, Q)
        name = f"{at}.kv_a_proj_with_mqa.weight"
        yield self.matrix(name, f"{to}/w_kva_DC", Z + P, D)
        yield self.vector(f"{at}.kv_a_layernorm.weight", f"{to}/norm_kv/scale_D", Z)
        yield heads("kv_b_proj", "w_kvb_ZHC", cfg.nope_dim + U, Z)
        yield self.piece(
            f"{at}.o_proj.weight",
            f"{to}/w_out_HVD",
            (D, H, U),
            (1, 2, 0),
            shape=(D, H * U),
        )

    def matrix(self, name, path, outputs, inputs, index=()) -> Piece:
        """The piece of a matrix: [outputs, inputs] there, [inputs, outputs] here."""
        return self.piece(name, path, (outputs, inputs), (1, 0), index)

    def dense(self, at, to, F, D) -> Iterator[Piece]:
        for i, name in enumerate(("gate", "up")):
            own = (EVERYTHING, i)
            yield self.matrix(f"{at}.{name}_proj.weight", f"{to}/w_in_D2F", F, D, own)
        yield self.matrix(f"{at}.down_proj.weight", f"{to}/w_out_FD", D, F)

    def moe(self, cfg: MoE, D, names: Names) -> Iterator[Piece]:
        at, to, E = names.sparse, "ffn", cfg.num_experts
        router, experts = cfg.router, cfg.experts
        assert isinstance(router, TopK) and isinstance(experts, Glu)
        F = experts.hidden
        gate = f"{at}.{names.router}"
        yield self.matrix(f"{gate}.weight", f"{to}/router/w_DE", E, D)
        if router.logit_bias:
            yield self.vector(f"{gate}.bias", f"{to}/router/bias_logits_E", E)
        if router.bias_rate:
            name = f"{gate}.e_score_correction_bias"
            yield self.vector(name, f"{to}/router/bias_E", E)
        if names.experts is None:
            yield from self.mixed_experts(at, to, E, F, D)
        else:
            w_gate, w_up, w_down = names.experts
            for e in range(E):
                own = f"{at}.experts.{e}"
                for i, name in enumerate((w_gate, w_up)):
                    yield self.matrix(
                        f"{own}.{name}.weight",
                        f"{to}/experts/w_in_ED2F",
                        *(F, D, (e, EVERYTHING, i)),
                    )
                path = f"{to}/experts/w_out_EFD"
                yield self.matrix(f"{own}.{w_down}.weight", path, D, F, (e,))
        if cfg.shared is not None:
            assert isinstance(cfg.shared, Dense)
            F = cfg.shared.hidden
            yield from self.dense(f"{at}.shared_experts", f"{to}/shared", F, D)

    def mixed_experts(self, at, to, E, F, D) -> Iterator[Piece]:
        """Experts with gate and up alternating in the last axis, [in, out] as ours."""
        own, path = f"{at}.experts", f"{to}/experts"
        yield self.piece(
            f"{own}.gate_up_proj",
            f"{path}/w_in_ED2F",
            (E, D, F, 2),
            (0, 1, 3, 2),
            shape=(E, D, 2 * F),
        )
        yield self.piece(
            f"{own}.gate_up_proj_bias",
            f"{path}/bias_in_E2F",
            (E, F, 2),
            (0, 2, 1),
            shape=(E, 2 * F),
        )
        yield self.piece(f"{own}.down_proj", f"{path}/w_out_EFD", (E, F, D), (0, 1, 2))
        name = f"{own}.down_proj_bias"
        yield self.piece(name, f"{path}/bias_out_ED", (E, D), (0, 1))
