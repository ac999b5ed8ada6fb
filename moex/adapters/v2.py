"""LLaMA-Adapter V2: biases, scales, free norms, and gated attention to prompts.

Every adapted matrix gets a bias and a scale, every RMSNorm is trained, and the last
layers attend to learned prompts. With `Visual` the first layers attend to tokens of a
frozen vision encoder. All of it does nothing at first.

B batch · M visual tokens · C width of a visual token · P prompt length · Y layers with
extra keys · D model width · H query heads · I inputs · O outputs · N parts
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from moex.config.base import Config, ConfigError, require
from moex.nn.extra_keys import ExtraKeys, KeysAdapter
from moex.nn.norm import RMSNorm
from moex.nn.param import param
from moex.nn.projection import Adapter, AdapterConfig, Matrix

SIDES = ("input", "output", None)


@dataclasses.dataclass(kw_only=True, slots=True)
class Visual(Config):
    """Early fusion: the first layers attend to visual tokens of the batch."""

    width: int  # C, numbers of a visual token, >= 1
    tokens: int = 1  # M, visual tokens of a sequence, >= 1
    layers: int = 1  # how many of the first layers attend to them, >= 1
    # A batch with visual tokens trains only what is visual, and any other the rest.
    disjoint: bool = True

    def validate(self, path):
        for name in ("width", "tokens", "layers"):
            value, allowed = getattr(self, name), "at least 1; visual=None is for none"
            require(value >= 1, f"{path}.{name}", value, allowed)


@dataclasses.dataclass(kw_only=True, slots=True)
class AdapterV2(AdapterConfig):
    """Prompts for the last layers, a bias and a scale for every matrix, free norms."""

    TARGETLESS: ClassVar[bool] = True

    # All matrices of attentions and feed-forwards, but not those of routers.
    targets: tuple[str, ...] = ("attention/w_", "*ffn*/w_[!D]*")
    bias: bool = True  # b of s * (W x + b), or of W (s * x) + b
    # Where the scale s is: "output" as in the paper, "input" as in its code, or None.
    scale_side: str | None = "output"
    norms: bool = True  # scales of all RMSNorms are trained
    prompt_length: int | None = 10  # P, >= 1; None: no prompts
    # How many of the last layers have prompts, >= 1; None: all without visual tokens.
    layers: int | None = None
    visual: Visual | None = None  # None: no visual tokens

    def validate(self, path):
        for name in ("prompt_length", "layers"):
            value, allowed = getattr(self, name), "at least 1, or None"
            if name == "layers":
                allowed = "at least 1; prompt_length=None is for no prompts"
            require(value is None or value >= 1, f"{path}.{name}", value, allowed)
        ok = self.layers is None or self.prompt_length is not None
        require(ok, f"{path}.layers", self.layers, "None without prompt_length")
        side = "input, output or None"
        require(self.scale_side in SIDES, f"{path}.scale_side", self.scale_side, side)
        for_matrices = self.bias or self.scale_side is not None
        allowed = "() without bias and scale" if self.targets else "not empty"
        ok = bool(self.targets) == for_matrices
        require(ok, f"{path}.targets", self.targets, allowed)
        if not (for_matrices or self.prompt_length or self.visual or self.norms):
            raise ConfigError(f"{path}: nothing is trained; turn a part of it on.")

    def validate_matrix(self, matrix, path):
        looked_up = matrix.input_axis == "vocab"
        allowed = f"'output' or None for {matrix.path}, whose rows are looked up"
        ok = not (looked_up and self.scale_side == "input")
        require(ok, f"{path}.scale_side", self.scale_side, allowed)

    def trained_too(self):
        return (*self.also_train, "norm") if self.norms else self.also_train

    def fields(self):
        if self.visual is None:
            return {}
        shape = (self.visual.tokens, self.visual.width)
        return {"visual": (shape, "float32"), "has_visual": ((), "int32")}

    def check_run(self, cfg, path):
        if self.visual is None or not self.visual.disjoint:
            return
        why = f"with {path}.visual.disjoint, as "
        one = cfg.data.one_source or cfg.task.num_domains(cfg) == 1
        told = f"True {why}a batch trains what is visual, or the rest"
        require(one, "config.data.one_source", cfg.data.one_source, told)
        told = f"None {why}gradients of the two kinds have norms of their own"
        factor = cfg.optim.spike_factor
        require(factor is None, "config.optim.spike_factor", factor, told)

    def make(self, matrix, rngs):
        return BiasAndScale(self, matrix, rngs)

    def extend(self, model, cfg, rngs, path):
        """Add prompts and visual tokens; say which batches train which parameters."""
        made = self.keys_adapters(cfg, rngs, path)
        model.adapters = nnx.Dict({**model.adapters, **made})
        if self.visual is None or not self.visual.disjoint:
            return
        for where, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            kind = "visual" if where[:2] == ("adapters", "visual") else "text"
            variable.set_metadata(trained_by=kind)

    def extra_keys(self, cfg, number):
        early, late = self._early_and_late(cfg)
        keys = 0
        if self.visual is not None and number < early:
            keys += self.visual.tokens
        if self.prompt_length is not None and number >= cfg.num_layers() - late:
            keys += self.prompt_length
        return keys

    def _early_and_late(self, cfg) -> tuple[int, int]:
        """The layers that see visual tokens, and those that would have prompts."""
        early = 0 if self.visual is None else self.visual.layers
        late = cfg.num_layers() - early if self.layers is None else self.layers
        return early, late

    def keys_adapters(self, cfg, rngs, path) -> dict[str, KeysAdapter]:
        """The adapters of the whole model, by name."""
        total, (early, late) = cfg.num_layers(), self._early_and_late(cfg)
        of_model = f"{total}, the layers of the model"
        require(early <= total, f"{path}.visual.layers", early, f"at most {of_model}")
        if early:
            of_model = f"{total - early}, the layers without visual tokens"
        made: dict[str, KeysAdapter] = {}
        if self.prompt_length is not None:
            ok = 1 <= late <= total - early
            require(ok, f"{path}.layers", self.layers, f"at most {of_model}")
            place = LayerRange.of(cfg, total - late, late, path)
            made["prompts"] = Prompts(place, self.prompt_length, rngs)
        if self.visual is not None:
            place = LayerRange.of(cfg, 0, early, path)
            made["visual"] = VisualTokens(place, self.visual, rngs)
        return made


class BiasAndScale(Adapter):
    """s * (W x + b) or W (s * x) + b.

    Parameters: bias_NO and scale_NO, both [N, *outer] with outer as in `Matrix`, or
    scale_NI [N, I] in place of the latter; for stacked experts with a leading dim [E].

    Source: Gao et al. 2023, arXiv:2304.15010, section 4.1; the scale of the input is
    that of its released code.
    """

    def __init__(self, cfg: AdapterV2, matrix: Matrix, rngs):
        super().__init__(matrix)
        # Devices that split the inputs add their outputs up, so each adds its share.
        self.adds_up = matrix.input_axis == "mlp"

        def vector(wanted, value, *, inputs=False) -> nnx.Param | None:
            if not wanted:
                return None
            shape, axes = matrix.outer, matrix.outer_axes
            if inputs:
                shape, axes = (matrix.inputs,), (matrix.input_axis,)
            return matrix.array(
                rngs,
                (matrix.parts, *shape),
                (None, *axes),
                lambda _, full: jnp.full(full, value, jnp.float32),
            )

        self.bias_NO = vector(cfg.bias, 0.0)
        self.scale_NO = vector(cfg.scale_side == "output", 1.0)
        self.scale_NI = vector(cfg.scale_side == "input", 1.0, inputs=True)

    def __call__(self, x, base, product, ctx):
        if self.scale_NI is None:
            y = base(x)
        else:
            x = x[..., None, :]
            x = x * self._each(self.scale_NI, x, product)
            y = base(x[..., 0, :]) if self.parts == 1 else _by_part(base, x)
        if self.bias_NO is not None:
            share = ctx.tensor_share if self.adds_up else 1.0
            y += share * self._each(self.bias_NO, y, product)
        if self.scale_NO is not None:
            y *= self._each(self.scale_NO, y, product)
        return y, None

    def _each(self, parameter, like, product):
        """A parameter for all rows, or one for each, to go with `like` [..., N, C]."""
        own = product.each(parameter, like.dtype)
        rows = own.shape[:1] if self.per_expert else (1,) * (like.ndim - 2)
        return own.reshape(*rows, self.parts, -1)


def _by_part(base, x):
    """The outputs of all parts, each with an input of its own: [..., N, I] -> O."""
    parts = [base(x[..., n, :], n) for n in range(x.shape[-2])]
    return jnp.concatenate(parts, axis=-2)


@dataclasses.dataclass(frozen=True)
class LayerRange:
    """The layers with extra keys."""

    dim: int
    heads: int
    first: int  # depth of the first of them, from 0
    layers: int  # how many there are
    everywhere: bool  # these are all layers of the model

    @classmethod
    def of(cls, cfg, first: int, layers: int, path: str) -> "LayerRange":
        """The `layers` layers of a model config from `first` on."""
        attentions = [
            attention
            for segment in cfg.layers
            for _ in range(segment.repeat)
            for attention in segment.attentions(cfg.attention)
        ][first : first + layers]
        for attention in attentions:
            if not attention.takes_extra_keys:
                kind = type(attention).__name__
                raise ConfigError(f"{path}: {kind} cannot attend to extra keys.")
        heads = sorted({attention.score_heads() for attention in attentions})
        allowed = "the same in all layers with extra keys"
        require(len(heads) == 1, f"{path}: the number of heads", heads, allowed)
        everywhere = layers == cfg.num_layers()
        return cls(cfg.dim, heads[0], first, layers, everywhere)

    def gate(self, rngs) -> nnx.Param:
        """The gate of each head in each layer, 0 at first: [Y, H]."""
        return param(rngs, (self.layers, self.heads), (None, "heads"), value=0.0)

    def keys(self, x_YBPD, gate_YBH) -> ExtraKeys:
        return ExtraKeys(
            x_YBPD=x_YBPD,
            gate_YBH=gate_YBH,
            first=self.first,
            everywhere=self.everywhere,
        )


class Prompts(KeysAdapter):
    """Learned states that the last Y layers attend to, each its own.

    Parameters: prompt_YPD [Y, P, D], gate_YH [Y, H], which a tanh limits.

    Source: Zhang et al. 2023, arXiv:2303.16199, section 3.2; initial values as in its
    released code.
    """

    def __init__(self, place: LayerRange, length: int, rngs):
        self.place = place
        shape, axes = (place.layers, length, place.dim), (None, None, "embed")
        self.prompt_YPD = param(rngs, shape, axes, std=1.0)
        self.gate_YH = place.gate(rngs)

    def keys(self, ctx):
        gate_YH = jnp.tanh(self.gate_YH[...])
        return self.place.keys(self.prompt_YPD[...][:, None], gate_YH[:, None])


class VisualTokens(KeysAdapter):
    """norm(x W + b) of the visual tokens x, which the first Y layers attend to.

    Parameters: w_CD [C, D], bias_D, norm, gate_YH [Y, H], which a tanh limits. A
    sequence without visual tokens is not changed.

    Source: Gao et al. 2023, arXiv:2304.15010, section 4.3 (early fusion).
    """

    def __init__(self, place: LayerRange, cfg: Visual, rngs):
        self.place, (C, D) = place, (cfg.width, place.dim)
        whole = ((0,), (1,))
        self.w_CD = param(rngs, (C, D), (None, "embed"), fan_in=C, matrix=whole)
        self.bias_D = param(rngs, (D,), ("embed",), value=0.0)
        self.norm = RMSNorm(D, rngs, axis="embed")
        self.gate_YH = place.gate(rngs)

    def keys(self, ctx):
        if ctx.visual_BMC is None:
            return None
        dtype = ctx.compute.dtype
        x_BMD = ctx.visual_BMC.astype(dtype) @ self.w_CD[...].astype(dtype)
        x_BMD = self.norm(x_BMD + self.bias_D[...].astype(dtype)[None, None])
        gate_YBH = jnp.tanh(self.gate_YH[...])[:, None]
        if ctx.has_visual_B is not None:
            gate_YBH = gate_YBH * (ctx.has_visual_B > 0)[None, :, None]
        return self.place.keys(x_BMD[None], gate_YBH)
