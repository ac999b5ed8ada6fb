"""Other people's grouped experts, where installed, and what they published.

T tokens · K slots per token · N sorted rows · D, F widths · E experts
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PUBLISHED = pathlib.Path(__file__).parent / "published.json"


def published(shape_name: str | None) -> dict:
    """`{system: [forward, backward or None]}` in TFLOP/s of one H100, bfloat16."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))["shapes"].get(
        shape_name or "", {}
    )


def ragged_dot_experts(ragged_dot):
    """The layer as one writes it around a ragged dot: sort, two matmuls, unsort."""

    def experts(x_TD, w_in, w_out, expert_TK, gate_TK):
        E, D, _, F = w_in.shape
        K = expert_TK.shape[1]
        expert_N = expert_TK.reshape(-1)
        order_N = jnp.argsort(expert_N)
        sizes_E = jnp.bincount(expert_N, length=E).astype(jnp.int32)
        x_ND = x_TD[order_N // K]
        a_NC = ragged_dot(x_ND, w_in.reshape(E, D, 2 * F), sizes_E)
        h_NF = jax.nn.silu(a_NC[:, :F]) * a_NC[:, F:]
        y_ND = ragged_dot(h_NF, w_out, sizes_E)
        y_TKD = y_ND[jnp.argsort(order_N)].reshape(-1, K, D)
        return jnp.einsum("tkd,tk->td", y_TKD, gate_TK.astype(y_ND.dtype))

    return experts


def tokamax_ragged_dot():
    """tokamax's ragged dot, or None where it is not installed."""
    try:
        import tokamax
    except ImportError:
        return None
    return tokamax.ragged_dot


@dataclasses.dataclass
class TorchResult:
    """Work that torch started; `jax.block_until_ready` waits for it like an array."""

    value: Any

    def block_until_ready(self):
        """Waits for the GPU; on a CPU torch is done already."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


def torch_grouped_mm(arrays, expert_TK):
    """`(forward, forward and backward)` with torch's grouped matmul; None without it.

    The layer is written as torchtitan and transformers do: sort, `grouped_mm`, SwiGLU,
    `grouped_mm`, `index_add`; compiled on a GPU, where that is the faster.
    """
    try:
        import torch
    except ImportError:
        return None
    functional = torch.nn.functional
    grouped_mm = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensor(a):
        t = torch.from_numpy(np.asarray(a.astype(jnp.float32))).to(device)
        return t.to(torch.bfloat16) if a.dtype == jnp.bfloat16 else t

    *leaves, dy = (tensor(a) for a in arrays)
    x, w_router, w_in, w_out = (t.requires_grad_() for t in leaves)
    (E, D, _, F), K = w_in.shape, expert_TK.shape[1]
    chosen = torch.from_numpy(expert_TK).long().to(device)

    def layer():
        probs = torch.softmax((x @ w_router).float(), dim=-1)
        gate = probs.gather(1, chosen)
        gate = (gate / gate.sum(dim=1, keepdim=True)).to(x.dtype)
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.bincount(flat, minlength=E).cumsum(0).to(torch.int32)
        a = grouped_mm(x[order // K], w_in.reshape(E, D, 2 * F), offs=ends)
        h = functional.silu(a[:, :F]) * a[:, F:]
        y = grouped_mm(h, w_out, offs=ends) * gate.reshape(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // K, y)

    if device == "cuda":
        layer = torch.compile(layer)

    def forward():
        with torch.no_grad():
            return TorchResult(layer())

    def backward():
        return TorchResult(torch.autograd.grad(layer(), (x, w_router, w_in, w_out), dy))

    return forward, backward


def torch_products(lhs, rhs, dout, sizes) -> dict:
    """`{"fwd", "dx", "dw"}` of torch's grouped matmul; {} where it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensor(a):
        t = torch.from_numpy(np.asarray(a.astype(jnp.float32))).to(device)
        return t.to(torch.bfloat16) if a.dtype == jnp.bfloat16 else t

    a, b, g = tensor(lhs), tensor(rhs), tensor(dout)
    ends = torch.from_numpy(np.cumsum(np.asarray(sizes))).to(torch.int32).to(device)

    return {
        "fwd": lambda: TorchResult(grouped_mm(a, b, offs=ends)),
        "dx": lambda: TorchResult(grouped_mm(g, b.transpose(1, 2), offs=ends)),
        "dw": lambda: TorchResult(grouped_mm(a.T, g, offs=ends)),
    }


def torch_dot(a, b) -> dict:
    """`{"matmul": job}` of torch's dense matmul; {} without torch or its GPU."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    a, b = (
        torch.from_numpy(np.asarray(m.astype(jnp.float32))).cuda().bfloat16()
        for m in (a, b)
    )
    return {"matmul": lambda: TorchResult(a @ b)}
