"""The contracts of a block's two parts: what attentions and feed-forwards must define.

A kind is a config class and the module that its `make` returns. Subclass the config
here, define what is abstract, and override the other hooks where their answer differs.

B batch · L length · S cache length · D model width
"""

import abc
import dataclasses
from typing import Any, ClassVar

from flax import nnx

from moex.config.base import Config, ConfigError, walk


@dataclasses.dataclass(kw_only=True, slots=True)
class PartConfig(Config, abc.ABC):
    """Base of the configs that make a part of a layer."""

    causal: ClassVar[bool] = True  # False: its output for a token depends on later ones
    needs_token_ids: ClassVar[bool] = False  # True: only for tasks that have them


def not_causal(model: Config, path: str = "config.model") -> str | None:
    """The field that lets a model see later tokens, so it cannot decode; or None."""
    for where, node in walk(model, path):
        if isinstance(node, PartConfig) and not node.causal:
            return where
    return None


@dataclasses.dataclass(kw_only=True, slots=True)
class FeedForwardConfig(PartConfig):
    """A feed-forward: what a pattern of a `Segment` names, and what can be nested."""

    role: ClassVar[str] = "a feed-forward config such as Dense or MoE"

    @abc.abstractmethod
    def make(self, dim: int, rngs: nnx.Rngs) -> "FeedForward":
        """The module for a model of width `dim`."""

    def validate_dim(self, dim: int, path: str) -> None:
        """Raise `ConfigError` for what needs the model width D to be seen."""

    def validate_repeat(self, repeat: int, path: str) -> None:
        """Raise `ConfigError` for errors that only the segment's repeat shows."""

    def param_use(self, name: str, experts_per_token=None) -> tuple[float, float]:
        """The share of a parameter that a token uses, and the times it is used.

        Args:
          name: path of the parameter in the layer, such as "experts/w_out_EFD".
          experts_per_token: measured, one number or one per chain round; None: the
            number expected before training.
        """
        return 1.0, 1.0

    def wraps(self, dim: int) -> tuple[str, "FeedForwardConfig", int] | None:
        """The feed-forward inside, if any: (field, config, width of its tokens).

        The module has it in an attribute with the field's name, and `aux` under it.
        """
        return None

    def describe(self) -> str:
        """The kind in a few words for tables, such as `MoE(8, TopK, Glu)`."""
        return type(self).__name__


class FeedForward(nnx.Module):
    """The module of a feed-forward."""

    @abc.abstractmethod
    def __call__(self, x_BLD, ctx) -> tuple[Any, dict]:
        """Return `(y_BLD, aux)`: y is added to the residual stream, aux is reported.

        `aux` is {} or mirrors the modules inside; that of an MoE layer is what
        `SparseLayer.mix` returns.
        """


@dataclasses.dataclass(kw_only=True, slots=True)
class AttentionConfig(PartConfig):
    """An attention: the first half of a block, with a cache for decoding."""

    role: ClassVar[str] = "an attention config such as Attention or LatentAttention"
    # True: its module attends to the extra keys of adapters, see `nn/extra_keys.py`.
    takes_extra_keys: ClassVar[bool] = False

    @abc.abstractmethod
    def make(self, dim: int, rngs: nnx.Rngs) -> "AttentionModule":
        """The module for a model of width `dim`."""

    @abc.abstractmethod
    def init_cache(self, dim: int, batch: int, length: int, dtype) -> dict:
        """Make a decoding cache of zeros: arrays by name, each [batch, length, ...]."""

    @abc.abstractmethod
    def score_width(self, dim: int) -> int:
        """The multiplications per query and visible key, for scores and values."""

    @abc.abstractmethod
    def visible_keys(self, seq_len: int) -> float:
        """The keys that a query sees, the mean over a sequence of one document."""

    @abc.abstractmethod
    def key_width(self, dim: int) -> int:
        """The number of values per token in its keys and values together."""

    def validate_dim(self, dim: int, path: str) -> None:
        """Raise `ConfigError` for what needs the model width D to be seen."""

    def score_heads(self) -> int:
        """The number of heads that have their own scores."""
        return 1


class AttentionModule(nnx.Module):
    """The module of an attention."""

    @abc.abstractmethod
    def __call__(self, x_BLD, ctx, cache) -> tuple[Any, Any]:
        """Return `(y_BLD, cache)`: y is added to the residual stream.

        Args:
          x_BLD: normalised residual stream.
          ctx: `Context`.
          cache: from `AttentionConfig.init_cache`, [B, S, ...]; None outside decoding.
        """


def check_output(module, y_BLD, x_BLD) -> None:
    """Raise `ConfigError` unless a part of a block kept the shape of its input."""
    if y_BLD.shape != x_BLD.shape:
        raise ConfigError(
            f"{type(module).__name__} returned y of shape {list(y_BLD.shape)}: must be "
            f"{list(x_BLD.shape)}, the shape of its input."
        )


class StackReader:
    """A module that can be given the parameters of all copies of its layer at once.

    With `ctx.whole_stack` its parameters have a leading dim [repeat], and it uses copy
    `ctx.layer` of them: a scan would copy the parameters of each layer instead.
    """

    def num_copies(self) -> int:
        """The number of copies of the layer, if `ctx.whole_stack`."""
        raise NotImplementedError
