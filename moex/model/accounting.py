"""The cost of a model: parameters (total, active), FLOPs per token, device peaks.

Counts are read off the abstract model, never from a formula of the config. The
feed-forward's config says how a token uses them (`param_use`): which share of a
parameter it uses, and how often.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moex.model.layers import Site, sites
from moex.model.paths import flat_paths
from moex.nn.lowered import SCALES, VALUES, weight_sizes
from moex.nn.model import Model
from moex.nn.projection import of_adapter

# Dense bfloat16 peak with float32 sums, 10^12 FLOP/s per device as JAX counts devices
# (half a chip of TPU v2, v3 and TPU7x). The key is all of `device_kind`: other devices
# have names that begin alike. The sources are NVIDIA's data sheets, halved where they
# count sparsity, for GeForce the white papers of Ampere, Ada and Blackwell, and
# Google's page of each TPU (docs.cloud.google.com/tpu/docs). A device that is not here,
# or has no bfloat16 (V100, T4), has no MFU.
PEAK_TFLOPS = {
    "NVIDIA A10": 125.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,  # SXM
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.0,  # SXM
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA GH200 480GB": 989.0,
    "NVIDIA GH200 120GB": 989.0,
    "NVIDIA B100": 1750.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "TPU v2": 23.0,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
}

# Zero-computation experts are in "experts", projections and shared experts in "dense".
GROUPS = (
    *("embedding", "attention", "router", "experts", "dense", "norms", "logits"),
    "adapters",
)
# The names of parameters without a matmul (added, scaled with or looked up) begin so.
NO_MATMUL = ("bias", "scale", "logit_scale", "w_embed", "sink")


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """The cost of one layer; `repeat` equal ones are at its place of a pattern."""

    path: str  # path of the block in the model, such as "segments/0/blocks/1"
    ffn: Any  # the config of its feed-forward
    repeat: int  # number of equal layers
    sizes: dict[str, int]  # numbers of one layer by path inside the block
    score_flops: float  # forward FLOPs per token of attention scores and values
    frozen: frozenset[str] = frozenset()  # those of `sizes` that are not trained
    # Parameters that all experts share, with the number of experts.
    shared: dict[str, int] = dataclasses.field(default_factory=dict)
    extra_flops: float = 0.0  # those of `score_flops` for the extra keys of adapters

    def total(self) -> dict[str, int]:
        """The parameters of one layer, by group."""
        return _by_group(self.sizes)

    def active(self) -> dict[str, float]:
        """The parameters of one layer that a token uses, counted once, by group."""
        return _by_group({n: v * self._use(n)[0] for n, v in self.sizes.items()})

    def forward_flops(self, experts_per_token=None) -> float:
        """The forward FLOPs per token of one layer.

        Args:
          experts_per_token: measured in this layer, one value or one per chain round;
            None: the number expected before training.
        """
        return self._flops(experts_per_token, lambda _: 1) + self.score_flops

    def backward_flops(self, experts_per_token=None) -> float:
        """The same of the backward pass; a frozen matrix has no gradient of its own."""
        met = self._flops(experts_per_token, lambda n: 1 if n in self.frozen else 2)
        return met + 2 * self.score_flops

    def adapter_flops(self) -> float:
        """The part of the forward FLOPs that adapters do."""
        own = self._flops(None, lambda n: param_group(n) == "adapters")
        return own + self.extra_flops

    def _flops(self, experts_per_token, products) -> float:
        """The FLOPs of as many products as `products` says for each matrix."""
        return 2 * sum(
            size * self._use(name, experts_per_token)[1] * products(name)
            for name, size in self.sizes.items()
            if _is_multiplied(name)
        )

    def _use(self, name: str, experts_per_token=None) -> tuple[float, float]:
        if not name.startswith("ffn/"):
            return 1.0, 1.0
        use = self.ffn.param_use(name.removeprefix("ffn/"), experts_per_token)
        # Each slot uses all of a parameter that the experts share.
        return (1.0, use[1] * self.shared[name]) if name in self.shared else use


@dataclasses.dataclass(frozen=True)
class Cost:
    """Size of a model and its work per token.

    A matrix counts 2 FLOPs per number each time it is applied. Attention scores and
    values count over the causal half of the sequence; elementwise work, embedding
    look-ups and what is done once for a sequence, such as keys of prompts, count 0. A
    backward pass is twice a forward one, less the gradients of frozen matrices;
    recomputation counts 0.
    """

    # In order of depth, one per segment and place in its pattern.
    blocks: tuple[BlockCost, ...]
    outer: dict[str, int]  # numbers outside of the blocks, by path
    outer_flops: float  # their forward FLOPs per token
    outer_backward: float  # those of the backward pass

    @property
    def total(self) -> dict[str, int]:
        """The parameters by group of `GROUPS`."""
        return self._sum(BlockCost.total)

    @property
    def active(self) -> dict[str, float]:
        """The parameters that one token's forward pass uses, by group."""
        return self._sum(BlockCost.active)

    @property
    def num_params(self) -> int:
        return sum(self.total.values())

    @property
    def num_active(self) -> int:
        return round(sum(self.active.values()))

    @property
    def train_flops(self) -> float:
        """The FLOPs per trained token, forward and backward, expected before training.

        The sequence length is the one that `model_cost` was asked for.
        """
        return self.train_flops_at({})

    def train_flops_at(self, layers: dict) -> float:
        """The same as `train_flops`, with the experts that were really used.

        Args:
          layers: metrics by module path; "experts_per_token" is [repeat], or
            [repeat, C] for a chain. Layers without any count as expected.
        """
        flops = self.outer_flops + self.outer_backward
        for block in self.blocks:
            passes = block.forward_flops, block.backward_flops
            measured = [
                values["experts_per_token"]
                for path, values in layers.items()
                if path.startswith(f"{block.path}/")
            ]
            if measured:
                counts = np.asarray(measured[0])
                flops += sum(one(count) for one in passes for count in counts)
            else:
                flops += block.repeat * sum(one() for one in passes)
        return float(flops)

    @property
    def adapter_flops(self) -> float:
        """The forward FLOPs per token of adapters, expected before training."""
        own = {n: v for n, v in self.outer.items() if param_group(n) == "adapters"}
        inside = sum(b.repeat * b.adapter_flops() for b in self.blocks)
        return inside + 2 * sum(v for n, v in own.items() if _is_multiplied(n))

    def _sum(self, figure) -> dict:
        sums = _by_group(self.outer)
        for block in self.blocks:
            for group, value in figure(block).items():
                sums[group] += block.repeat * value
        return sums


def device_peak_flops(device=None) -> float | None:
    """The peak dense bfloat16 FLOP/s of a device, or None where it is not known."""
    tera = PEAK_TFLOPS.get((device or jax.devices()[0]).device_kind)
    return None if tera is None else tera * 1e12


def device_bytes(devices: Sequence[jax.Device]) -> float:
    """The memory of one device; CPU devices share the memory of the host."""
    device = devices[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if device.platform != "cpu":
        return math.inf
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host / len(devices)


def _by_group(sizes: dict[str, Any]) -> dict[str, Any]:
    sums = dict.fromkeys(GROUPS, 0)
    for name, size in sizes.items():
        sums[param_group(name)] += size
    return sums


def param_group(path: str) -> str:
    """The group of `GROUPS` that a parameter counts in, by its path."""
    *parts, name = path.split("/")
    if of_adapter(path):
        return "adapters"
    if name == "w_embed_VD":
        return "embedding"
    if name == "w_logits_DV":
        return "logits"
    if name.startswith("scale"):
        return "norms"
    owners = {"attention": "attention", "router": "router", "routers": "router"}
    owners |= {"experts": "experts", "zero": "experts"}
    return next((owners[part] for part in parts if part in owners), "dense")


def _is_multiplied(path: str) -> bool:
    """Whether a token is multiplied by a parameter."""
    *owners, name = path.split("/")
    if of_adapter(path):
        matrix = owners[-1]  # an embedding is looked up, and with it the inputs' side
        inputs_first = name.rpartition("_")[2].startswith("I")
        looked_up = matrix.startswith("w_embed") and inputs_first
        if looked_up or not matrix.startswith("w_"):  # or it is of the whole model
            return False
    return not name.startswith(NO_MATMUL)


def model_cost(cfg: Model, spec, seq_len: int) -> Cost:
    """The parameters and FLOPs of a model at a sequence length.

    Args:
      cfg: model config, complete with the fields that the data gives (the vocabulary).
      spec: `ModelSpec` of it.
      seq_len: tokens per sequence, for attention.
    """
    sizes = weight_sizes(flat_paths(spec.params))
    still = {n.removesuffix(VALUES) for n, info in spec.info.items() if info.frozen}
    blocks = []
    for site in sites(cfg):
        # Scores and values take one multiplication and one addition per number and key.
        keys = site.attention.visible_keys(seq_len)
        per_key = 2 * site.attention.score_width(cfg.dim)
        extra_flops = per_key * _extra_keys(cfg, site)
        own = {
            n.removeprefix(f"{site.path}/"): size // site.repeat
            for n, size in sizes.items()
            if n.startswith(f"{site.path}/")
        }
        frozen = frozenset(n for n in own if f"{site.path}/{n}" in still)
        block = BlockCost(
            *(site.path, site.ffn, site.repeat, own, per_key * keys + extra_flops),
            frozen=frozen,
            shared=_shared_by_experts(site, own, spec.info),
            extra_flops=extra_flops,
        )
        blocks.append(block)
    outer = {n: v for n, v in sizes.items() if not n.startswith("segments/")}
    multiplied = {n: v for n, v in outer.items() if _is_multiplied(n)}
    multiplied |= {name: outer[name] for name in cfg.used_again()}
    trained = sum(v for n, v in multiplied.items() if n not in still)
    forward = 2 * sum(multiplied.values())
    return Cost(tuple(blocks), outer, forward, forward + 2 * trained)


def _extra_keys(cfg: Model, site: Site) -> float:
    """The keys that a query sees by adapters, the mean over the layers of a site."""
    if cfg.adapter is None:
        return 0.0
    return sum(cfg.adapter.extra_keys(cfg, n) for n in site.numbers) / site.repeat


def _shared_by_experts(site: Site, names, info) -> dict[str, int]:
    """The parameters of adapters that the experts of a site share: {name: experts}."""
    return {
        name: site.sparse.moe.num_stored()
        for name in names
        if site.sparse is not None
        and "/experts/adapters/" in name
        and "expert" not in info[f"{site.path}/{name}"].axes
    }


def bytes_per_token(cfg: Model, params: dict, experts_per_token=None) -> float:
    """The bytes of parameters that one token's forward pass reads.

    A token reads the experts that it uses and one row of the embedding.

    Args:
      cfg: model config.
      experts_per_token: of every layer; None: as expected before training.
      params: `{path: array}` of the model, weights of blocks by their parts; only
        shapes and dtypes count.
    """
    total = 0.0
    ffns = {f"{site.path}/ffn/": site.ffn for site in sites(cfg)}
    for path, array in params.items():
        name = path.removesuffix(VALUES).removesuffix(SCALES)
        share = 1.0
        if name == "w_embed_VD" and name not in cfg.used_again():
            share = 1 / array.shape[0]
        for start, ffn in ffns.items():
            if name.startswith(start):
                own = name.removeprefix(start)
                share = ffn.param_use(own, experts_per_token)[0]
        total += share * num_bytes(array)
    return total


def num_bytes(tree) -> int:
    """The bytes of all leaves of a tree of arrays or `ShapeDtypeStruct`s."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)


def local_bytes(tree) -> int:
    """The bytes on one device of abstract arrays that have shardings."""
    local = ((a.sharding.shard_shape(a.shape), a.dtype) for a in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in local)


def train_state_bytes(spec, tx) -> int:
    """The bytes of weights, of gradients of trained weights, and optimizer state."""
    leaves = flat_paths(spec.params)
    trained = [a for name, a in leaves.items() if not spec.info[name].frozen]
    optimizer = num_bytes(jax.eval_shape(tx.init, spec.params))
    return num_bytes(spec.params) + num_bytes(trained) + optimizer


def model_table(cfg: Model, spec, tx, seq_len: int) -> str:
    """The model as a table for people: groups, parameters, bytes, FLOPs."""
    cost = model_cost(cfg, spec, seq_len)
    total, active = cost.total, cost.active
    rows = [f"{'':<12}{'parameters':>16}{'active/token':>16}"]
    for group in GROUPS:
        if total[group]:
            rows.append(f"{group:<12}{total[group]:>16,}{round(active[group]):>16,}")
    rows.append(f"{'total':<12}{cost.num_params:>16,}{cost.num_active:>16,}")
    gib = train_state_bytes(spec, tx) / 2**30
    if total["adapters"]:
        rows.append(
            f"adapters take {cost.adapter_flops / 1e9:.3g} GFLOP of the forward pass "
            "of a token"
        )
    rows.append(
        f"{cfg.num_layers()} layers, width {cfg.dim}, {cfg.about()};\n"
        f"{cost.train_flops / 1e9:.3g} GFLOP per trained token at length {seq_len};\n"
        f"{gib:.3g} GiB of weights, gradients and optimizer state"
    )
    return "\n".join(rows)
