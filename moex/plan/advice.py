"""Changes that make a job fit; each one is planned, not guessed."""

import copy
import math

from moex.config.base import Config, ConfigError
from moex.model.optim import Muon
from moex.plan.planner import Plan, plan
from moex.sharding import BATCH_AXES

GIB = 2**30


def advice(cfg, found: Plan) -> list[str]:
    """Changes that make a job fit, smallest first, and what each peak would be.

    Every one is planned with all checks; those that do not fit are left out, and the
    rest is tried together if none does alone.
    """
    changes = list(_changes(cfg, found))
    lines = [_tried(cfg, found, change) for change in changes]
    fitting = [line for line in lines if line]
    if fitting:
        return fitting
    together: dict = {}
    for change in changes:
        for key, value in change.items():
            together.setdefault(key, value)
    line = _tried(cfg, found, together) if len(changes) > 1 else None
    return [line] if line else [least_devices(found)]


def _changes(cfg, found: Plan):
    """{path: value} of each change that could be made."""
    if cfg.remat != "full":
        yield {"remat": "full"}
    shards = math.prod(found.mesh[name] for name in BATCH_AXES)
    micro = cfg.batch_size // cfg.grad_accum
    if micro > shards:
        fewest = cfg.batch_size // shards  # one sequence per device
        steps = [cfg.grad_accum * 2**i for i in range(1, 20)]
        allowed = [a for a in steps if fewest % a == 0]
        for accum in dict.fromkeys([*allowed[:1], fewest]):
            yield {"grad_accum": accum, "eval.batch_size": cfg.batch_size // accum}
    data, fsdp, expert = (found.mesh[n] for n in ("data", "fsdp", "expert"))
    inner = data // found.topology.slices
    if inner > 1:
        slices = found.topology.slices
        yield {"mesh.data": slices, "mesh.fsdp": fsdp * inner}
        yield {"mesh.data": slices, "mesh.fsdp": fsdp, "mesh.expert": expert * inner}
    if fsdp > 1:
        yield {"mesh.fsdp": fsdp // 2, "mesh.tensor": found.mesh["tensor"] * 2}
    if not isinstance(cfg.optim.rule, Muon):
        yield {"optim.rule": Muon(adam_lr=cfg.optim.lr)}


def _tried(cfg, found: Plan, change: dict) -> str | None:
    """One line on a change if the job fits with it."""
    other = copy.deepcopy(cfg)
    for path, value in change.items():
        *parts, name = path.split(".")
        node = other
        for part in parts:
            node = getattr(node, part)
        setattr(node, name, value)
    try:
        new = plan(other, found.topology)
    except ConfigError:
        return None
    if not new.fits:
        return None
    flags = " ".join(f"--config.{path}={_shown(v)}" for path, v in change.items())
    return f"{flags}: {new.memory.peak / GIB:.1f} GiB"


def _shown(value) -> str:
    return f"{type(value).__name__}(...)" if isinstance(value, Config) else f"{value}"


def least_devices(found: Plan) -> str:
    """A line that says how many devices the state and gradients alone would take."""
    limit, memory = found.topology.chip.memory, found.memory
    assert limit is not None
    fixed = memory.state + memory.gradients
    # Scale by all parameters (float32) over those of one device: copies count once.
    whole = fixed * 4 * found.num_params / memory.params
    return (
        f"no change here makes it fit; state and gradients alone take "
        f"{fixed / GIB:.1f} GiB of each device, and {math.ceil(whole / limit)} "
        f"{found.topology.kind} devices at the least if they are split evenly"
    )
