"""`moex plan`: the plan of a config, and the compiler's word on it if asked for."""

import json

from moex.plan import report
from moex.plan.advice import advice
from moex.plan.planner import plan
from moex.plan.rehearsal import DoesNotFit, compile_step
from moex.topology import parse


def run(cfg, topology: str, *, compile: bool = False, as_json: bool = False) -> str:
    """What `moex plan` prints.

    Args:
      cfg: run config; its vocabulary is filled in.
      topology: such as "v5p:4x4x4".
      compile: compile the train step too.
      as_json: JSON instead of text.

    Raises:
      ConfigError: for a mistake in the config or the topology.
      DoesNotFit: if the compiler finds no place for the job.
    """
    where = parse(topology)
    found = plan(cfg, where)
    changes = advice(cfg, found) if found.fits is False else []
    compiled = None
    if compile:
        try:
            compiled = compile_step(cfg, where)
        except DoesNotFit as error:
            changes = changes or advice(cfg, found)
            raise DoesNotFit(f"{error} To change: {'; '.join(changes)}.") from None
    if as_json:
        data = found.to_dict() | {"advice": changes}
        data["compiled"] = None if compiled is None else compiled.to_dict()
        return json.dumps(data)
    parts = [report.plan_text(found), report.fit_text(found, changes)]
    if compiled is not None:
        parts.append(report.compiled_text(compiled, found))
    return "\n\n".join(parts)
