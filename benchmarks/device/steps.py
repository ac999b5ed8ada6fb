"""The table of `python -m benchmarks.device`: what is measured, in order of worth.

A step has processes, each with a time limit of its own; a process has runs, which are
calls of the other benchmarks, one after the other. A GPU that a faulty kernel has upset
answers nothing more in its process, so kernels of different kinds have different ones.
"""

from dataclasses import dataclass, field

LOADS = "balanced,random,trained,zipf,half,one,empty,changing"
BF16 = "--dtype=bfloat16"
TINY = "--shape=32,2,8,16,8"


@dataclass(frozen=True)
class Run:
    """One call of a benchmark: `python -m MODULE ARGS --json=FILE`."""

    name: str
    module: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Process:
    """Runs that share a process."""

    name: str
    limit: int  # seconds, after which it is ended
    least: int  # seconds in which it can show anything
    runs: tuple[Run, ...]
    env: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One line of the table: processes, and those of a dry run."""

    name: str
    title: str
    why: str
    processes: tuple[Process, ...]
    dry: tuple[Run, ...]


def _tune(kernel: str) -> Process:
    runs = tuple(
        Run(
            f"{shape} {kernel}",
            "benchmarks.tune",
            (
                f"--shapes={shape}",
                f"--implementations={kernel}",
                "--seconds=20",
                "--out={out}/tilings.json",
            ),
        )
        for shape in ("H1", "H5", "H6")
    )
    return Process(kernel, 100, 25, runs)


def _products(name: str, kernels: str, others: str) -> Process:
    runs = tuple(
        Run(
            f"{shape} {name}",
            "benchmarks.grouped_matmul",
            (
                f"--shape={shape}",
                "--loads=random",
                f"--implementations={kernels}",
                f"--others={others}",
                "--repeats=5",
            ),
        )
        for shape in ("H5", "H6", "H1")
    )
    return Process(name, 60, 20, runs, SHARED)


def _layers(kernel: str, others: str) -> Process:
    runs = tuple(
        Run(
            f"{shape} {kernel}",
            "benchmarks.moe_layer",
            (
                f"--shape={shape}",
                "--loads=random",
                f"--implementations={kernel}",
                f"--others={others}",
                "--repeats=5",
            ),
        )
        for shape in ("H1", "H5", "H6")
    )
    return Process(kernel, 60, 20, runs, SHARED)


def _loads(kernel: str) -> Process:
    args = ("--shape=H1", f"--loads={LOADS}", f"--implementations={kernel}")
    run = Run(
        f"H1 {kernel}", "benchmarks.moe_layer", (*args, "--others=", "--repeats=5")
    )
    return Process(kernel, 40, 20, (run,))


def _train(name: str, *pairs: tuple[str, str]) -> Process:
    runs = tuple(
        Run(
            f"{kernel} {remat}",
            "benchmarks.train_step",
            (
                "--config=configs/moe_100m.py",
                "--random=32000",
                "--step-only",
                "--config.batch_size=32",
                "--config.grad_accum=1",
                f"--config.kernels={kernel}",
                f"--config.remat={remat}",
            ),
        )
        for kernel, remat in pairs
    )
    return Process(name, 60 + 30 * (len(pairs) - 1), 30, runs)


def _chain(name: str) -> Run:
    config = f"--config=benchmarks/chain_of_experts.py:run={name}"
    args = (config, "--random=102400", "--step-only")
    return Run(name, "benchmarks.train_step", args)


def _decode(batch: int) -> Run:
    args = ("--alone", "--models=olmoe", f"--batches={batch}", "--repeats=3", BF16)
    return Run(f"olmoe {batch}", "benchmarks.decode", args)


def _offload(batch: int) -> Run:
    args = ("--shape=olmoe", f"--batches={batch}", "--repeats=3", "--weights=float32")
    args = (*args, "--bank=pinned", BF16)
    return Run(f"olmoe {batch}", "benchmarks.offload", args)


# JAX must leave memory to torch.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

STEPS = (
    Step(
        "kernels",
        "which kernels are right",
        "a kernel that is wrong makes every later figure worthless",
        (
            Process(
                "tests",
                150,
                30,
                (Run("tests", "benchmarks.device.kernels", ()),),
                SHARED,
            ),
        ),
        (Run("tests", "benchmarks.device.kernels", ("--dry-run",)),),
    ),
    Step(
        "ceiling",
        "dense bfloat16 matmul and copy of memory",
        "what the others are measured against",
        (
            Process(
                "ceiling", 45, 15, (Run("ceiling", "benchmarks.ceiling", ()),), SHARED
            ),
        ),
        (
            Run(
                "ceiling",
                "benchmarks.ceiling",
                ("--size=64", "--gigabytes=0.001", "--repeats=1"),
            ),
        ),
    ),
    Step(
        "tiles",
        "tiles, for `kernels_pallas/tilings.json`",
        "the later steps run with what is found here",
        (_tune("triton"), _tune("mosaic")),
        (
            Run(
                "H1 triton",
                "benchmarks.tune",
                (
                    "--dry-run",
                    "--implementations=triton",
                    "--operations=product",
                    "--out={out}/tilings.json",
                ),
            ),
        ),
    ),
    Step(
        "grouped_matmul",
        "grouped matmul forward, dx, dW over a dense one; to be 0.85 at H5 and H6, and "
        "not below the best peer",
        "the kernels alone, beside those of others",
        (
            _products("triton", "triton", ""),
            _products("mosaic", "mosaic", ""),
            _products("peers", "", "grouped_mm,tokamax,ragged_dot"),
        ),
        (
            Run(
                "H5 triton",
                "benchmarks.grouped_matmul",
                (
                    TINY,
                    "--loads=random",
                    "--implementations=triton_interpret",
                    "--repeats=1",
                    "--others=",
                ),
            ),
        ),
    ),
    Step(
        "layers",
        "whole layers beside torch and the published figures; to be above ScatterMoE's "
        "at every shape",
        "what a training step is made of",
        (_layers("triton", "dense,grouped_mm"), _layers("mosaic", "")),
        (
            Run(
                "H1 triton",
                "benchmarks.moe_layer",
                (
                    TINY,
                    "--loads=random",
                    "--implementations=xla",
                    "--others=",
                    "--repeats=1",
                ),
            ),
        ),
    ),
    Step(
        "loads",
        "loads W0 to W7 at H1, to be 1.15 times balanced at most",
        "routers are never balanced",
        (_loads("triton"), _loads("mosaic")),
        (
            Run(
                "H1 triton",
                "benchmarks.moe_layer",
                (
                    TINY,
                    f"--loads={LOADS}",
                    "--implementations=xla",
                    "--others=",
                    "--repeats=1",
                ),
            ),
        ),
    ),
    Step(
        "train",
        "training tokens/s and MFU of `moe_100m`, batch 32, by kernels and by remat",
        "what a user gets",
        (
            _train("triton", *(("triton", r) for r in ("dots", "none", "full"))),
            _train("mosaic", ("mosaic", "dots")),
            _train("xla", ("xla", "dots")),
        ),
        (
            Run(
                "triton dots",
                "benchmarks.train_step",
                (
                    "--config=benchmarks/chain_of_experts.py:run=moe,size=tiny",
                    "--random=264",
                    "--step-only",
                    "--repeats=2",
                    "--config.kernels=xla",
                    "--config.remat=dots",
                ),
            ),
        ),
    ),
    Step(
        "chain",
        "Chain-of-Experts at the paper's size, time per 100 steps; the paper's on one "
        "H100: 175.5 s (2 rounds of 8), 98.9 s (no chain)",
        "how long the papers' experiments take",
        (Process("chain", 100, 30, tuple(map(_chain, ("coe", "moe", "coe8")))),),
        (
            Run(
                "coe",
                "benchmarks.train_step",
                (
                    "--config=benchmarks/chain_of_experts.py:size=tiny",
                    "--random=264",
                    "--step-only",
                    "--repeats=2",
                ),
            ),
        ),
    ),
    Step(
        "decode",
        "prefill and decode tokens/s of the shape of OLMoE 1B-7B, bfloat16",
        "how long evaluations that write text take",
        (Process("decode", 120, 40, tuple(map(_decode, (1, 8, 64)))),),
        (
            Run(
                "olmoe 1",
                "benchmarks.decode",
                (
                    "--alone",
                    "--models=tiny",
                    "--batches=2",
                    "--prompt=4",
                    "--new=3",
                    "--repeats=1",
                ),
            ),
        ),
    ),
    Step(
        "offload",
        "decode with 100, 50 and 25 % of the experts on the device, the others in "
        "pinned memory, four layers of OLMoE 1B-7B, bfloat16: tokens/s, hits",
        "whether models larger than the device can be used",
        (Process("offload", 90, 40, tuple(map(_offload, (1, 8)))),),
        (
            Run(
                "olmoe 1",
                "benchmarks.offload",
                (
                    *("--shape=tiny", "--batches=1", "--new=3", "--repeats=1"),
                    "--weights=float32",
                ),
            ),
        ),
    ),
    Step(
        "variants",
        "whole layers of every kind over top-k",
        "what the other layers cost where memory is quick",
        (
            Process(
                "variants",
                60,
                30,
                (
                    Run(
                        "triton",
                        "benchmarks.moe_layer",
                        (
                            "--variants",
                            "--shape=8192,8,2048,1024,64",
                            "--implementations=triton",
                        ),
                    ),
                ),
            ),
        ),
        (),
    ),
    Step(
        "train_peers",
        "training step beside transformers, float32",
        "the same question as on a CPU",
        (
            Process(
                "train_peers",
                120,
                60,
                tuple(
                    Run(
                        f"{E} experts",
                        "benchmarks.train_step_peers",
                        (f"--experts={E}", "--attention=sdpa", "--optimizer=fused"),
                    )
                    for E in (8, 64)
                ),
                SHARED,
            ),
        ),
        (),
    ),
)


def processes(step: Step, dry_run: bool) -> tuple[Process, ...]:
    """The processes of a step; all runs of a dry run are in one."""
    if not dry_run:
        return step.processes
    return (Process("dry", 600, 1, step.dry),) if step.dry else ()
