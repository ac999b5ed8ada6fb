"""Ahead-of-time compilation of the real train step, for devices that are not there.

The compiler says whether a job fits, its peak memory on one device and the collectives
it put in. Nothing is run. TPUs need libtpu, which the extra `aot` installs;
CPU devices are those of this process.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from moex import hints
from moex.config.base import ConfigError, RunError
from moex.model.spec import model_spec
from moex.plan.memory import batch_arguments
from moex.plan.topology import Topology
from moex.process import host_bytes
from moex.progress import phase
from moex.train.job import Training

# libtpu reads these before it describes a topology. Without them it waits for a
# metadata server. The values do not limit the topologies.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second process ends
}

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute"),
)


class DoesNotFit(RunError):
    """The compiler found that the job does not fit into the memory of a device."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's figures of one train step."""

    # lower_seconds, compile_seconds: of lowering and compiling, on this machine.
    lower_seconds: float
    compile_seconds: float
    host_bytes: int  # most memory that this process used
    # Bytes of the train state on one device, by the shapes in the program.
    state_bytes: int
    # Train state and batch on one device as they lie in memory: a TPU keeps arrays in
    # tiles, so that a scalar takes 512 bytes.
    argument_bytes: int
    peak_bytes: int  # most memory at any time on one device
    temp_bytes: int  # bytes of buffers that are neither arguments nor results
    # Number by kind in the program's text, which has the body of a scan once however
    # often it runs.
    collectives: dict[str, int]

    def to_dict(self) -> dict:
        """The figures as plain data."""
        return dataclasses.asdict(self)


def described_devices(topology: Topology) -> list:
    """Devices to compile for.

    Raises:
      ConfigError: if the topology is of no TPU, libtpu is missing, or this process has
        too few CPU devices.
    """
    if topology.platform == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.num_devices:
            raise ConfigError(
                f"--compile: needs {topology.num_devices} CPU devices, and there are "
                f"{len(devices)}; start with JAX_NUM_CPU_DEVICES="
                f"{topology.num_devices}."
            )
        return devices[: topology.num_devices]
    if topology.platform != "tpu":
        raise ConfigError(
            f"--compile: is for TPUs and CPUs, not for {topology.name}; a GPU program "
            "is compiled where the GPU is. Without --compile it is planned."
        )
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "--compile: the compiler for TPUs, libtpu, is not installed: "
            f"{hints.command('pip', 'install', 'moex[aot]')} (or in place of "
            "'moex[aot]' 'libtpu==0.0.42.*' for JAX 0.10, 'libtpu==0.0.50.*' for 0.12)"
        ) from None
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.num_devices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--compile: libtpu knows no {name}: {reason}") from None
    devices = list(found.devices)
    if len(devices) != topology.num_devices:
        raise ConfigError(
            f"--compile: libtpu describes {name} as {len(devices)} devices, and the "
            f"plan counts {topology.num_devices}, one a chip (libtpu takes each core "
            "of a v4 chip for a device); without --compile it is planned."
        )
    return devices


def train_arguments(program: Training) -> tuple:
    """The abstract arguments of `Training.train_step`, each with its sharding."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=program.whole)
        for a in (jax.ShapeDtypeStruct((), jnp.int32), key)
    ]
    return program.abstract_state(), *placed, batch_arguments(program)


def compile_step(cfg, topology: Topology) -> Compiled:
    """Compile the train step of a checked config for a topology.

    Raises:
      ConfigError: if that is not possible here.
      DoesNotFit: if the compiler needs more memory than a device has.
    """
    devices = described_devices(topology)
    mesh = cfg.mesh.make(devices)
    with jax.set_mesh(mesh):
        program = Training(cfg=cfg, mesh=mesh, spec=model_spec(cfg.model, mesh))
        arguments = train_arguments(program)
        start = time.perf_counter()
        lowered = program.train_step().lower(*arguments)
        middle = time.perf_counter()
        try:
            with phase("compiling the train step"):
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise _refusal(error, topology) from None
        end = time.perf_counter()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    # A CPU's compiler gives no peak, only what it allocates besides the arguments.
    peak = memory.peak_memory_in_bytes
    if topology.platform == "cpu":
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    return Compiled(
        lower_seconds=middle - start,
        compile_seconds=end - middle,
        host_bytes=host_bytes(),
        state_bytes=state_bytes(text, arguments[0]),
        argument_bytes=memory.argument_size_in_bytes,
        peak_bytes=peak,
        temp_bytes=memory.temp_size_in_bytes,
        collectives=count_collectives(text),
    )


# The shapes of a compiled program's arguments on one device, in its text.
ENTRY = re.compile(r"entry_computation_layout=\{\((.*?)\)->")
SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")


def state_bytes(text: str, state) -> int:
    """Bytes of the train state in a compiled program's own arguments, not in tiles.

    The state comes first, and all of it is used.
    """
    found = SHAPE.findall(ENTRY.search(text)[1])  # type: ignore[index]
    sizes = [
        math.prod(map(int, filter(None, shape.split(","))))
        * (1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8)
        for kind, shape in found
    ]
    return sum(sizes[: len(jax.tree.leaves(state))])


def count_collectives(text: str) -> dict[str, int]:
    """Number of collectives in a compiled program's text, by kind; no zeros."""
    counts = {
        kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES
    }
    return {kind: count for kind, count in counts.items() if count}


def _refusal(error, topology: Topology) -> Exception:
    """`DoesNotFit` for a compiler's error about memory, else the error itself."""
    text = str(error)
    if "Ran out of memory" not in text:
        return error
    sizes = re.search(r"\(([\d.]+\w)\) exceeds available \w+ \(([\d.]+\w)\)", text)
    needs = f"needs {sizes[1]}iB of {sizes[2]}iB" if sizes else text.splitlines()[0]
    return DoesNotFit(f"{topology.name}: the job does not fit: one device {needs}.")
