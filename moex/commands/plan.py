"""`moex plan`; see docs/plan.md."""

import json

from moex.commands import Verb
from moex.commands.arguments import add_json
from moex.config.base import ConfigError
from moex.process import use_cpu


class Command(Verb):
    """Say what a job needs from devices that need not be there.

    It prints the memory of a device, the bytes and the time of communication over each
    mesh axis, the time of a step, and what to change if it does not fit. No data is
    read and no array is made.
    """

    examples = """
    Examples:
      moex plan --config=moe_8x7b --topology=v5p:4x4x4
      moex plan --config=moe_1b --topology=h100:8 --config.remat=dots
      moex plan --config=quickstart --topology=v5e:1x1 --compile
    """

    def add(self, parser):
        parser.add_argument(
            "--topology",
            metavar="NAME",
            help="v5p:4x4x4 or v5e:16x16 (TPU chips), v5e:16x16*2 (two slices), "
            "h100:8x4 (4 nodes of 8 GPUs), cpu:8; devices: v4 v5e v5p v6e a100 h100 "
            "h200 cpu",
        )
        parser.add_argument(
            "--compile",
            action="store_true",
            help="compile the train step for it too, with libtpu (extra `aot`)",
        )
        add_json(parser)

    def run(self, args, config_args):
        from moex.plan import report
        from moex.plan.advice import advice
        from moex.plan.planner import plan
        from moex.plan.rehearsal import DoesNotFit, compile_step, described_devices
        from moex.plan.topology import parse
        from moex.runs.directory import given_config

        if args.topology is None:
            raise ConfigError("--topology: missing; give devices, such as v5p:4x4x4.")
        cfg = given_config(config_args)
        use_cpu()
        where = parse(args.topology)
        if args.compile:  # refuse what the compiler cannot do before any work
            described_devices(where)
        found = plan(cfg, where)
        changes = advice(cfg, found) if found.fits is False else []
        if not args.json:
            print(f"{report.plan_text(found)}\n\n{report.fit_text(found, changes)}")
        compiled = refusal = None
        if args.compile:
            try:
                compiled = compile_step(cfg, where)
            except DoesNotFit as error:  # show the plan first, then the error
                changes = changes or advice(cfg, found)
                refusal = DoesNotFit(f"{error} To change: {'; '.join(changes)}.")
        if args.json:
            data = found.to_dict() | {"advice": changes}
            data["compiled"] = None if compiled is None else compiled.to_dict()
            data["refused"] = None if refusal is None else str(refusal)
            print(json.dumps(data))
        elif compiled is not None:
            print(f"\n{report.compiled_text(compiled, found)}")
        if refusal is not None:
            raise refusal
