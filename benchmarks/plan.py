"""Compare `moex plan` with libtpu's compiler, for pods that are not there.

  python -m benchmarks.plan [--cases=quickstart_v5e,..] [--json=benchmarks/results/plan]

Each case is compiled in a process of its own, one after the other; it needs the extra
`aot`. A record holds the plan, the compiler's figures, and how far they are apart.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

DEEPSEEK = ("--config=configs/deepseek_v3.py",)
MIXTRAL = ("--config=configs/moe_8x7b.py",)
# Name -> (topology, flags of the config).
CASES = {
    "quickstart_v5e": ("v5e:1x1", ("--config=configs/quickstart.py",)),
    "quickstart_v5e_256": (
        "v5e:1x1",
        ("--config=configs/quickstart.py", "--config.batch_size=256"),
    ),
    "moe_100m_v5e": (
        "v5e:2x4",
        ("--config=configs/moe_100m.py", "--config.model.vocab=32000"),
    ),
    "moe_1b_v5p": (
        "v5p:2x2x2",
        ("--config=configs/moe_1b.py", "--config.model.vocab=32000"),
    ),
    "moe_8x7b_v5p_as_it_is": ("v5p:4x4x4", MIXTRAL),
    "moe_8x7b_v5p": (
        "v5p:4x4x4",
        (*MIXTRAL, "--config.mesh.expert=4"),
    ),
    "moe_8x7b_v5p_fsdp": ("v5p:4x4x4", (*MIXTRAL, "--config.grad_accum=16")),
    "moe_8x7b_v6e": (
        "v6e:8x8",
        (*MIXTRAL, "--config.mesh.expert=8", "--config.grad_accum=16"),
    ),
    "deepseek_v3_v5p": ("v5p:4x8x8", DEEPSEEK),
}


def record(name: str) -> dict:
    """The record of one case."""
    import jax

    from moex.config.flags import load_config
    from moex.plan.planner import plan
    from moex.plan.rehearsal import DoesNotFit, compile_step
    from moex.plan.topology import parse

    topology, flags = CASES[name]
    cfg, where = load_config(list(flags)), parse(topology)
    planned = plan(cfg, where)
    made = {
        "case": name,
        "flags": list(flags),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "plan": planned.to_dict(),
    }
    try:
        compiled = compile_step(cfg, where)
    except DoesNotFit as error:
        return made | {"refused": str(error)}
    return made | {
        "compiled": compiled.to_dict(),
        "same_state_bytes": compiled.state_bytes == planned.memory.state,
        "peak_over_plan": compiled.peak_bytes / planned.memory.peak,
    }


def line(made: dict) -> str:
    """One record for people."""
    planned = made["plan"]["memory"]["peak"] / 2**30
    if "refused" in made:
        return f"{made['case']}: planned {planned:.2f} GiB; {made['refused']}"
    compiled = made["compiled"]
    seconds = compiled["lower_seconds"] + compiled["compile_seconds"]
    peak, gap = compiled["peak_bytes"] / 2**30, made["peak_over_plan"] - 1
    return (
        f"{made['case']}: planned {planned:.2f} GiB, compiled {peak:.2f} GiB "
        f"({gap:+.1%}), "
        f"state bytes {'equal' if made['same_state_bytes'] else 'DIFFER'}; "
        f"{seconds:.0f} s, {compiled['host_bytes'] / 2**30:.1f} GiB here; "
        f"{compiled['collectives']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--json", type=pathlib.Path, help="folder of the records")
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    for name in args.cases.split(","):
        if not args.here:
            options = [f"--json={args.json}"] if args.json else []
            command = [sys.executable, "-m", "benchmarks.plan", f"--cases={name}"]
            subprocess.run([*command, "--here", *options], check=True)
            continue
        made = record(name)
        print(line(made), flush=True)
        if args.json:
            args.json.mkdir(parents=True, exist_ok=True)
            path = args.json / f"{name}.json"
            path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
