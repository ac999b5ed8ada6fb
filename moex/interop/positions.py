"""The rotary positions that a `config.json` describes, in the forms that there are.

transformers 5 has one object `rope_parameters`. Versions before it had `rope_theta`
next to an object `rope_scaling`, and some families write fields of the object there.
The order in which transformers 5.24 looks at these places is kept here; places that
contradict each other are refused, although it takes one of them.
"""

import math
from typing import Any

from moex.config.base import nearest
from moex.interop.fields import Fields
from moex.nn.rope import Linear, Llama3, Yarn

OBJECTS = ("rope_scaling", "rope_parameters")  # the first that is not empty is read
ORIGINAL = "original_max_position_embeddings"
KINDS = ("default", "linear", "llama3", "yarn")
# All fields that an object of any kind may have; a kind reads its own fields.
KNOWN = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
    *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor"),
    *("short_factor", "long_factor", "mrope_section", "finetuned"),
)
NEEDLESS: dict[str, Any] = {
    **{"partial_rotary_factor": None, "attention_factor": None, "mscale": None},
    **{"mscale_all_dim": None, "beta_fast": None, "beta_slow": None, "truncate": True},
}


def rope(of: Fields) -> tuple[dict, float]:
    """(`rope_theta` and `rope_scaling` of an attention, factor on scores of MLA)."""
    own = _object(of)
    kind = own("rope_type", str)
    if kind not in KINDS:
        raise own.refuse("rope_type", kind, "'default', 'linear', 'llama3' or 'yarn'")
    theta = float(own("rope_theta", float))
    share = own("partial_rotary_factor", float, null=1.0)
    if share != 1.0:
        raise own.refuse("partial_rotary_factor", share, "1.0")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}, 1.0
    scaling: Any = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[kind](own, of)
    all_dims = own("mscale_all_dim", float, null=0.0)
    scores = _sharper(scaling.factor, all_dims) ** 2 if all_dims else 1.0
    return {"rope_theta": theta, "rope_scaling": scaling}, scores


def _object(of: Fields) -> Fields:
    """The fields about positions, from the place or the places where they stand."""
    of.read |= {"rope_theta", "partial_rotary_factor", ORIGINAL}
    found = {name: of(name, dict, null=None) for name in OBJECTS}
    # An object that is null stands for the family's own; an empty one does not.
    given = [name for name in OBJECTS if found[name]]
    name = given[0] if given else "rope_parameters"
    values = found[name]
    if values is None:
        values = of.defaults["own_rope"]
    values = _complete(of, name, values)
    for other in given[1:]:
        if _complete(of, other, found[other]) != values:
            raise of.refuse(other, found[other], f"equal to {name}, or left out")
    return Fields(f"{of.where}: {name}", values, NEEDLESS)


def _complete(of: Fields, name: str, values: dict) -> dict:
    """An object with what transformers adds to it from the fields next to it."""
    values = dict(values)
    for key, value in values.items():
        if isinstance(value, dict):
            raise of.refuse(name, values, "one object for all layers, not by layer")
        if key not in KNOWN:
            raise of.refuse(
                f"{name}.{key}", value, f"left out: unknown.{nearest(key, KNOWN)}"
            )
    kind = values.pop("type", "default")
    values.setdefault("rope_type", kind)
    for field in ("rope_theta", "partial_rotary_factor"):
        if field in of.values or field in of.defaults:
            values.setdefault(field, of.values.get(field, of.defaults.get(field)))
    if ORIGINAL in of.values:
        values[ORIGINAL] = of.values[ORIGINAL]
    return values


def _factor(own: Fields) -> float:
    return own("factor", float, least=1)


def _linear(own: Fields, of: Fields) -> Linear:
    return Linear(factor=_factor(own))


def _original(own: Fields, of: Fields) -> int:
    """The length of the context before it was extended, in tokens."""
    if ORIGINAL in own.values:
        return own.count(ORIGINAL)
    return of.count("max_position_embeddings")


def _llama3(own: Fields, of: Fields) -> Llama3:
    low, high = own("low_freq_factor", float), own("high_freq_factor", float)
    if not low < high:
        raise own.refuse("low_freq_factor", low, f"below high_freq_factor = {high}")
    return Llama3(factor=_factor(own), original=_original(own, of), low=low, high=high)


def _yarn(own: Fields, of: Fields) -> Yarn:
    original = _original(own, of)
    if own.values.get("factor", ...) is None:
        own.values["factor"] = of.count("max_position_embeddings") / original
    factor = _factor(own)
    one = own("mscale", float, null=0.0)
    all_dims = own("mscale_all_dim", float, null=0.0)
    magnitude = own("attention_factor", float, null=None)
    if magnitude is None and one and all_dims:
        magnitude = _sharper(factor, one) / _sharper(factor, all_dims)
    # Zero stands for the paper's value, as null does.
    fast = own("beta_fast", float, null=0) or 32.0
    slow = own("beta_slow", float, null=0) or 1.0
    if not 0 < slow < fast:
        raise own.refuse("beta_slow", slow, f"above 0, below beta_fast = {fast}")
    return Yarn(
        factor=factor,
        original=original,
        fast=fast,
        slow=slow,
        magnitude=magnitude,
        truncate=own("truncate", bool, null=False),
    )


def _sharper(factor, magnitude) -> float:
    return 1.0 if factor <= 1 else 0.1 * magnitude * math.log(factor) + 1.0
