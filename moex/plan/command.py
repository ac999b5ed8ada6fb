"""`moex plan`: the plan of a config, and the compiler's word on it if asked for."""

import json
from collections.abc import Callable

from moex.plan import report
from moex.plan.advice import advice
from moex.plan.planner import plan
from moex.plan.rehearsal import DoesNotFit, compile_step
from moex.plan.topology import parse


def run(
    cfg,
    topology: str,
    *,
    compile: bool = False,
    as_json: bool = False,
    show: Callable[[str], None] = print,
) -> None:
    """`moex plan`; the plan is shown even if the compiler finds no room for the job.

    Args:
      cfg: run config; its vocabulary is filled in.
      topology: such as "v5p:4x4x4".
      compile: compile the train step too.
      as_json: JSON instead of text.
      show: prints.

    Raises:
      ConfigError: for a mistake in the config or the topology.
      DoesNotFit: if the compiler finds no place for the job.
    """
    where = parse(topology)
    found = plan(cfg, where)
    changes = advice(cfg, found) if found.fits is False else []
    if not as_json:
        show(f"{report.plan_text(found)}\n\n{report.fit_text(found, changes)}")
    compiled = refusal = None
    if compile:
        try:
            compiled = compile_step(cfg, where)
        except DoesNotFit as error:
            changes = changes or advice(cfg, found)
            refusal = DoesNotFit(f"{error} To change: {'; '.join(changes)}.")
    if as_json:
        data = found.to_dict() | {"advice": changes}
        data["compiled"] = None if compiled is None else compiled.to_dict()
        data["refused"] = None if refusal is None else str(refusal)
        show(json.dumps(data))
    elif compiled is not None:
        show(f"\n{report.compiled_text(compiled, found)}")
    if refusal is not None:
        raise refusal
