"""A plan, and what a compiler said, as text for people."""

from moex.numbers import scaled
from moex.plan.planner import Plan
from moex.plan.rehearsal import Compiled
from moex.terminal import aligned

MEMORY_ROWS = (
    ("params", "parameters"),
    ("optimizer", "optimizer state"),
    ("other_state", "router state, counters"),
    ("batch", "token arrays"),
    ("gradients", "gradients"),
    ("gathered", "weights of one layer, gathered"),
    ("kept", "activations kept for the backward pass"),
    ("working", "working memory beside them"),
)


def plan_text(plan: Plan) -> str:
    """The plan as a table for people."""
    return "\n\n".join([_head(plan), _memory(plan), _traffic(plan), _time(plan)])


def _head(plan: Plan) -> str:
    axes = " ".join(f"{name}={n}" for name, n in plan.mesh.items())
    setting = plan.setting
    return (
        f"{plan.topology.name}: {plan.topology.num_devices} x "
        f"{plan.topology.chip.device_kind}, {axes}\n"
        f"{scaled(plan.num_params)} parameters, {scaled(plan.active_params)} a token; "
        f"{scaled(plan.flops_per_token)}FLOP per trained token, "
        f"{scaled(plan.recompute_flops)}FLOP more of recomputation\n"
        f"{scaled(plan.tokens)} tokens a step in {setting['grad_accum']} microbatches; "
        f"{setting['dtype']}, remat {setting['remat']}"
    )


def _memory(plan: Plan) -> str:
    memory = plan.memory
    rows = [("memory of one device", "")]
    rows += [(text, _bytes(getattr(memory, name))) for name, text in MEMORY_ROWS]
    passes = memory.gathered + memory.kept + memory.working
    if memory.update > passes:
        rows.append(("(the optimizer's update needs more:)", _bytes(memory.update)))
    rows.append(("peak", _bytes(memory.peak)))
    limit = plan.topology.chip.memory
    rows.append(("a device has", "not known" if limit is None else _bytes(limit)))
    return aligned(rows)


def _traffic(plan: Plan) -> str:
    if not plan.carried:
        return "no axis carries anything"
    rows = [("received by one device in a step", "", "time")]
    for row in plan.carried:
        name = f"{row.axis}: {row.what}"
        rows.append((name, _bytes(row.received), _seconds(row.seconds)))
    return aligned(rows)


def _time(plan: Plan) -> str:
    seconds, mfu = plan.step_seconds(), plan.mfu()
    rows = [
        ("matmuls at the peak rate", _seconds(plan.compute_seconds)),
        ("the optimizer's update", _seconds(plan.update_seconds)),
    ]
    if seconds is None or mfu is None:
        rows.append(("step", "not known: a speed of this device is not published"))
        return aligned(rows)
    least, most = seconds
    rows.append(("step, all traffic hidden", f"{_seconds(least)}  MFU {mfu[0]:.1%}"))
    rows.append(("step, none hidden", f"{_seconds(most)}  MFU {mfu[1]:.1%}"))
    return aligned(rows)


def fit_text(plan: Plan, advice: list[str]) -> str:
    """Text that says whether the job fits, and what makes it fit."""
    limit = plan.topology.chip.memory
    if limit is None:
        return "Whether it fits is not known: the memory of this device is not."
    share = plan.memory.peak / limit
    if plan.fits:
        return f"It fits: {share:.0%} of a device's memory."
    lines = [
        f"It does not fit: {_bytes(plan.memory.peak)} of {_bytes(limit)} ({share:.0%})."
    ]
    return "\n".join(lines + [f"  {line}" for line in advice])


def compiled_text(compiled: Compiled, plan: Plan) -> str:
    """The compiler's figures next to the planned ones."""
    gap = compiled.peak_bytes / plan.memory.peak - 1
    same = "equal to" if compiled.state_bytes == plan.memory.state else "NOT"
    rows = [
        ("compiled in", _seconds(compiled.lower_seconds + compiled.compile_seconds)),
        ("memory of this process", _bytes(compiled.host_bytes)),
        ("train state", f"{_bytes(compiled.state_bytes)}, {same} the plan's"),
        ("arguments, in tiles", _bytes(compiled.argument_bytes)),
        ("peak", f"{_bytes(compiled.peak_bytes)}, {gap:+.1%} of the plan"),
    ]
    rows += [
        (f"{kind} in the text", f"{n}") for kind, n in compiled.collectives.items()
    ]
    return aligned(rows)


def _bytes(value: float) -> str:
    return scaled(value, 1024, "B")


def _seconds(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
