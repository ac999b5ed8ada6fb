"""Which tensor of a checkpoint folder is which slice of which moex parameter.

Everything that differs between the names of families is in `Names`; shapes follow from
the model config. A tensor maps to ours by a reshape and a transpose, so both ways are
exact.

R query heads of a key/value head · G key/value heads · A head width · H heads · C width
of a head in latent attention · Z, Q latent widths · D model width · E experts · F
expert width · V vocabulary, or width of a value
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from moex.model.layers import layers
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of a folder as a slice of one of our arrays.

    ours[index] == theirs.reshape(split).transpose(order) * factor
    """

    name: str  # the name of the tensor in the folder
    path: str  # path of our parameter, or router state, as `flat_paths` has it
    index: tuple[int | slice, ...]  # into our array, one entry for each dim of it
    # For each dim of the tensor, the sizes of our dims that it joins.
    joined: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]  # axes of `split` as ours has them
    # Factor on the numbers of the folder; 1 for every imported tensor.
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the folder."""
        return tuple(map(math.prod, self.joined))

    @property
    def split(self) -> tuple[int, ...]:
        """A shape of as many elements in the same order, one dim for each of ours."""
        return tuple(size for sizes in self.joined for size in sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Names of a family inside of a layer, where they differ."""

    sparse: str = "mlp"  # the name of the feed-forward in sparse layers
    router: str = "gate"  # the name of the router in it
    # Gate, up and down of one expert; None: all experts in three tensors with gate and
    # up mixed (GPT-OSS).
    experts: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Makes the pieces below a name in the folder and a path of ours."""

    # theirs, ours: begin the names and the paths.
    theirs: str
    ours: str
    # The number of the copy, for a stacked layer; empty for any other array.
    copy: tuple[int, ...] = ()

    def piece(
        self,
        name: str,
        path: str,
        form: str,
        size: Mapping[str, int],
        at: Mapping[str, int] | None = None,
        factor: float = 1.0,
    ) -> Piece:
        """Make a piece of a parameter whose name ends in the letters of its dims.

        `piece("q", "w_DGA", "GA D", {"D": 5, "G": 2, "A": 4})` is a tensor [8, 5].

        Args:
          name: the name of the tensor, below `theirs`.
          path: the path of the parameter, below `ours`.
          form: the dims of the tensor, each by the letters of those of ours it joins.
          size: the size of each dim by letter, except for "2".
          at: the entry of a dim of ours that the tensor does not have, by letter.
          factor: see `Piece`.
        """
        at, letters = at or {}, form.replace(" ", "")
        size = {"2": 2, **size}
        dims = path.rpartition("_")[2]
        return Piece(
            self.theirs + name,
            self.ours + path,
            (*self.copy, *(at.get(letter, slice(None)) for letter in dims)),
            tuple(tuple(size[letter] for letter in dim) for dim in form.split()),
            tuple(letters.index(letter) for letter in dims if letter not in at),
            factor,
        )


def pieces(model: LM, names: Names) -> Iterator[Piece]:
    """Yield every tensor of a checkpoint of this model, in the order of the layers."""
    V, D = model.vocab, model.dim
    assert V is not None
    # Families do not scale embeddings; a model that does leaves with scaled rows.
    factor = D**-0.5 if model.scale_embeddings else 1.0
    top, size = _Place("", ""), {"V": V, "D": D}
    embed = "model.embed_tokens.weight"
    yield top.piece(embed, "w_embed_VD", "V D", size, factor=factor)
    for number, (site, r) in enumerate(layers(model)):
        own = _Place(f"model.layers.{number}.", f"{site.path}/", (r,))
        yield own.piece("input_layernorm.weight", "norm_attention/scale_D", "D", size)
        make = _attention if isinstance(site.attention, Attention) else _latent
        yield from make(own, site.attention, D)
        after = "post_attention_layernorm.weight"
        yield own.piece(after, "norm_ffn/scale_D", "D", size)
        if isinstance(site.ffn, Dense):
            yield from _dense(own, "mlp", "ffn", D, site.ffn.hidden)
        else:
            yield from _moe(own, site.ffn, D, names)
    yield top.piece("model.norm.weight", "norm/scale_D", "D", size)
    if not model.tied_embeddings:
        yield top.piece("lm_head.weight", "w_logits_DV", "V D", size)


def _attention(own: _Place, cfg: Attention, D: int) -> Iterator[Piece]:
    G, A = cfg.kv_heads or cfg.heads, cfg.width(D)
    at, to = "self_attn", "attention"
    size = {"D": D, "G": G, "R": cfg.heads // G, "A": A}
    yield own.piece(f"{at}.q_proj.weight", f"{to}/w_q_DGRA", "GRA D", size)
    for i, name in enumerate("kv"):
        weight, path = f"{at}.{name}_proj.weight", f"{to}/w_kv_D2GA"
        yield own.piece(weight, path, "GA D", size, {"2": i})
    yield own.piece(f"{at}.o_proj.weight", f"{to}/w_out_GRAD", "D GRA", size)
    if cfg.bias:
        yield own.piece(f"{at}.q_proj.bias", f"{to}/bias_q_GRA", "GRA", size)
        for i, name in enumerate("kv"):
            bias, path = f"{at}.{name}_proj.bias", f"{to}/bias_kv_2GA"
            yield own.piece(bias, path, "GA", size, {"2": i})
        yield own.piece(f"{at}.o_proj.bias", f"{to}/bias_out_D", "D", size)
    if cfg.qk_norm:
        for name, heads in (("q", cfg.heads), ("k", G)):
            width = heads * A if cfg.qk_norm == "whole" else A
            path = f"{to}/norm_{name}/scale_D"
            yield own.piece(f"{at}.{name}_norm.weight", path, "D", {"D": width})
    if cfg.sinks:
        yield own.piece(f"{at}.sinks", f"{to}/sink_GR", "GR", size)


def _latent(own: _Place, cfg: LatentAttention, D: int) -> Iterator[Piece]:
    at, to = "self_attn", "attention"
    Z, Q, P = cfg.kv_latent, cfg.q_latent, cfg.rope_dim
    size = {"D": D, "H": cfg.heads, "C": cfg.nope_dim + P, "Z": Z, "V": cfg.v_dim}
    if Q is None:
        yield own.piece(f"{at}.q_proj.weight", f"{to}/w_q_DHC", "HC D", size)
    else:
        size["Q"] = Q
        yield own.piece(f"{at}.q_a_proj.weight", f"{to}/w_qa_DQ", "Q D", size)
        norm = f"{at}.q_a_layernorm.weight"
        yield own.piece(norm, f"{to}/norm_q/scale_D", "D", {"D": Q})
        yield own.piece(f"{at}.q_b_proj.weight", f"{to}/w_qb_QHC", "HC Q", size)
    name, norm = f"{at}.kv_a_proj_with_mqa.weight", f"{at}.kv_a_layernorm.weight"
    yield own.piece(name, f"{to}/w_kva_DC", "C D", {"D": D, "C": Z + P})
    yield own.piece(norm, f"{to}/norm_kv/scale_D", "D", {"D": Z})
    keys_and_values = size | {"C": cfg.nope_dim + cfg.v_dim}
    name = f"{at}.kv_b_proj.weight"
    yield own.piece(name, f"{to}/w_kvb_ZHC", "HC Z", keys_and_values)
    yield own.piece(f"{at}.o_proj.weight", f"{to}/w_out_HVD", "D HV", size)


def _dense(own: _Place, at: str, to: str, D: int, F: int) -> Iterator[Piece]:
    size = {"D": D, "F": F}
    for i, name in enumerate(("gate", "up")):
        weight, path = f"{at}.{name}_proj.weight", f"{to}/w_in_D2F"
        yield own.piece(weight, path, "F D", size, {"2": i})
    yield own.piece(f"{at}.down_proj.weight", f"{to}/w_out_FD", "D F", size)


def _moe(own: _Place, cfg: MoE, D: int, names: Names) -> Iterator[Piece]:
    router, experts = cfg.router, cfg.experts
    assert isinstance(router, TopK) and isinstance(experts, Glu)
    at, gate = names.sparse, f"{names.sparse}.{names.router}"
    size = {"D": D, "E": cfg.num_experts, "F": experts.hidden}
    yield own.piece(f"{gate}.weight", "ffn/router/w_DE", "E D", size)
    if router.logit_bias:
        yield own.piece(f"{gate}.bias", "ffn/router/bias_logits_E", "E", size)
    if router.bias_rate:
        name = f"{gate}.e_score_correction_bias"
        yield own.piece(name, "ffn/router/bias_E", "E", size)
    w_in, w_out = "ffn/experts/w_in_ED2F", "ffn/experts/w_out_EFD"
    if names.experts is None:  # matrices are [in, out] as ours
        all_in, all_out = f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj"
        yield own.piece(all_in, w_in, "E D F2", size)
        yield own.piece(f"{all_in}_bias", "ffn/experts/bias_in_E2F", "E F2", size)
        yield own.piece(all_out, w_out, "E F D", size)
        yield own.piece(f"{all_out}_bias", "ffn/experts/bias_out_ED", "E D", size)
    else:
        *two, down = names.experts
        for e in range(cfg.num_experts):
            expert = f"{at}.experts.{e}"
            for i, name in enumerate(two):
                place = {"E": e, "2": i}
                yield own.piece(f"{expert}.{name}.weight", w_in, "F D", size, place)
            yield own.piece(f"{expert}.{down}.weight", w_out, "D F", size, {"E": e})
    if cfg.shared is not None:
        assert isinstance(cfg.shared, Dense)
        shared = f"{at}.shared_experts"
        yield from _dense(own, shared, "ffn/shared", D, cfg.shared.hidden)
