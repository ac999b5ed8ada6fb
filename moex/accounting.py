"""What a model costs: parameters (total, active), FLOPs per token, device peaks.

Counts are read off the abstract model, never from a formula of the config; only how
many experts a token uses comes from the config.
"""

import dataclasses
import math
from typing import Any

import jax

from moex.nn.lm import LM

# Dense bfloat16 peak, FLOP/s per device as JAX counts devices, by substring of
# `device_kind` (vendors' data sheets, without sparsity). First match wins.
PEAK_FLOPS = (
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L4", 121e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)

GROUPS = ("embedding", "attention", "router", "experts", "dense", "norms", "logits")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Size of a model and its work per token.

    Attributes:
      total: parameters by group of `GROUPS`.
      active: parameters that one token's forward pass uses, by group.
      train_flops: FLOPs per trained token (forward and backward, without remat) at
        the sequence length it was asked for; an embedding look-up counts 0.
    """

    total: dict[str, int]
    active: dict[str, float]
    train_flops: float

    @property
    def num_params(self) -> int:
        return sum(self.total.values())

    @property
    def num_active(self) -> int:
        return round(sum(self.active.values()))


def device_peak_flops(device=None) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None where it is not known."""
    kind = (device or jax.devices()[0]).device_kind
    return next((peak for name, peak in PEAK_FLOPS if name in kind), None)


def _group(path: str) -> str:
    parts = path.split("/")
    if parts[-1] == "w_embed_VD":
        return "embedding"
    if parts[-1] == "w_logits_DV":
        return "logits"
    if parts[-1].startswith("scale"):
        return "norms"
    for group in ("attention", "router", "experts"):
        if group in parts:
            return group
    return "dense"


def _active_frac(cfg: LM, path: str) -> float:
    """Share of a parameter that one token uses: k / E for experts, else 1."""
    parts = path.split("/")
    if "experts" not in parts:
        return 1.0
    segment, block = int(parts[1]), int(parts[3])
    moe: Any = cfg.layers[segment].pattern[block]
    return moe.router.slots(moe.num_experts) / moe.num_experts


def model_cost(cfg: LM, spec, seq_len: int) -> Cost:
    """Parameters and training FLOPs of a model.

    FLOPs: 2 per active parameter of a matrix and token, plus attention scores and
    values over the causal half of `seq_len`, times 3 for forward and backward.
    """
    total = dict.fromkeys(GROUPS, 0)
    active = dict.fromkeys(GROUPS, 0.0)
    leaves, _ = jax.tree_util.tree_flatten_with_path(spec.params)
    for path, leaf in leaves:
        name = "/".join(str(k.key) for k in path)
        size = math.prod(leaf.shape)
        total[_group(name)] += size
        active[_group(name)] += size * _active_frac(cfg, name)
    matmul = sum(v for k, v in active.items() if k not in ("embedding", "norms"))
    if cfg.tied_embeddings:
        matmul += total["embedding"]
    width = cfg.attention.heads * cfg.attention.width(cfg.dim)
    scores = 4 * cfg.num_layers() * width * (seq_len / 2)
    return Cost(total, active, 3 * (2 * matmul + scores))


def model_table(cfg: LM, spec, seq_len: int) -> str:
    """The model as a table for people: groups, parameters, bytes, FLOPs."""
    cost = model_cost(cfg, spec, seq_len)
    rows = [f"{'':<12}{'parameters':>16}{'active/token':>16}"]
    for group in GROUPS:
        if cost.total[group]:
            rows.append(
                f"{group:<12}{cost.total[group]:>16,}{round(cost.active[group]):>16,}"
            )
    rows.append(f"{'total':<12}{cost.num_params:>16,}{cost.num_active:>16,}")
    gib = 16 * cost.num_params / 2**30
    rows.append(
        f"{cfg.num_layers()} layers, width {cfg.dim}, vocabulary {cfg.vocab}; "
        f"{cost.train_flops / 1e9:.3g} GFLOP per trained token at length {seq_len}; "
        f"{gib:.3g} GiB of weights, gradients and Adam moments in float32"
    )
    return "\n".join(rows)
