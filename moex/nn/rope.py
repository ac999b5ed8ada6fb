"""Rotary positions: frequencies, their extensions to longer contexts, the rotation.

B batch · L length · H heads · A head width
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from moex.config.base import Config, require


@dataclasses.dataclass(kw_only=True, slots=True)
class Linear(Config):
    """All positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float  # growth of the context, >= 1

    def validate(self, path):
        require(self.factor >= 1, f"{path}.factor", self.factor, ">= 1")

    def scale(self, frequency, theta):
        """The frequencies for the longer context, and a factor on queries and keys."""
        return frequency / self.factor, 1.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Llama3(Config):
    """Only long wavelengths are stretched: `rope_type = "llama3"` of Llama 3.1."""

    factor: float  # growth of the context, >= 1
    original: int  # length of the context before, tokens
    low: float = 1.0  # a pair with fewer turns within `original` is stretched
    high: float = 4.0  # a pair with more turns is not; in between both are mixed

    def validate(self, path):
        require(self.factor >= 1, f"{path}.factor", self.factor, ">= 1")
        require(self.original >= 1, f"{path}.original", self.original, ">= 1")
        require(self.low < self.high, f"{path}.low", self.low, "below high")

    def scale(self, frequency, theta):
        """The same as `Linear.scale`."""
        turns = self.original * frequency / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequency * (kept + (1 - kept) / self.factor), 1.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Yarn(Config):
    """YaRN: slow pairs are stretched, quick ones stay, attention is made sharper.

    Source: Peng et al. 2023, arXiv:2309.00071, sections 3.2 to 3.4.
    """

    factor: float  # growth of the context, >= 1
    original: int  # length of the context before, tokens
    fast: float = 32.0  # a pair with more turns within `original` is not stretched
    slow: float = 1.0  # a pair with fewer turns is
    magnitude: float | None = None  # on queries and keys; None: 0.1 ln(factor) + 1
    truncate: bool = True  # whole pairs at the ends of the ramp

    def validate(self, path):
        require(self.factor >= 1, f"{path}.factor", self.factor, ">= 1")
        require(self.original >= 1, f"{path}.original", self.original, ">= 1")
        slow = 1e-30 <= self.slow < self.fast
        require(slow, f"{path}.slow", self.slow, "above 0 and below fast")

    def scale(self, frequency, theta):
        """The same as `Linear.scale`."""
        half = len(frequency)
        # The number of the pair with this many turns within the original context.
        low, high = (
            half * math.log(self.original / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (self.fast, self.slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # The released code, and all that follows it, has 2 * half - 1, not half - 1.
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low if high != low else 0.001
        stretched = np.clip((np.arange(half) - low) / width, 0, 1)
        mixed = frequency * (1 - stretched + stretched / self.factor)
        sharper = 0.1 * math.log(self.factor) + 1
        return mixed, sharper if self.magnitude is None else self.magnitude


Scaling = Linear | Llama3 | Yarn


def frequencies(width: int, theta: float, scaling: Scaling | None = None):
    """The width / 2 frequencies in radians per position, and the factor on q and k.

    They are plain numbers of float32: a module that holds them can be hashed, and does
    not change with its config.
    """
    frequency = theta ** (-np.arange(width // 2, dtype=np.float64) / (width // 2))
    magnitude = 1.0
    if scaling is not None:
        frequency, magnitude = scaling.scale(frequency, theta)
    return tuple(frequency.astype(np.float32).tolist()), float(magnitude)


def rotary(x_BLHA, position_BL, frequency, magnitude=1.0, interleaved=False):
    """Rotate pairs of the last axis by position * frequency, in float32.

    Args:
      x_BLHA: queries or keys; pair i is (i, i + A/2).
      position_BL: int32.
      frequency, magnitude: from `frequencies`.
      interleaved: pair i of the input is (2i, 2i + 1); pair i of the output is still
        (i, i + A/2), which changes no product of queries and keys.

    Source: Su et al. 2021, arXiv:2104.09864; halves as in Llama.
    """
    position_BL11 = position_BL[:, :, None, None].astype(jnp.float32)
    angle = position_BL11 * np.asarray(frequency, np.float32)[None, None, None]
    sin, cos = jnp.sin(angle) * magnitude, jnp.cos(angle) * magnitude
    x32 = x_BLHA.astype(jnp.float32)
    if interleaved:
        x32 = jnp.concatenate([x32[..., ::2], x32[..., 1::2]], axis=-1)
    cos = jnp.concatenate([cos, cos], axis=-1)
    sin = jnp.concatenate([-sin, sin], axis=-1)
    y = _turn(x32, cos, sin)
    return y.astype(x_BLHA.dtype)


@jax.custom_vjp
def _turn(x, cos, sin):
    """Turn rows by whole-row factors; `sin` is negative in the first half.

    The halves change places and whole rows are multiplied: to compute the halves apart
    and join them costs three times as much on a CPU. The gradient turns back in the
    same way; without this rule it would join products.
    """
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([second, first], axis=-1) * sin


def _turn_forward(x, cos, sin):
    return _turn(x, cos, sin), (cos, sin)


def _turn_backward(saved, dy):
    cos, sin = saved
    return _turn(dy, cos, -sin), None, None


_turn.defvjp(_turn_forward, _turn_backward)
