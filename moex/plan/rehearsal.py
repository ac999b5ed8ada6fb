"""Ahead-of-time compilation of the real train step, for devices that are not there.

What the compiler says of a job: whether it fits, its peak memory on one device and the
collectives it put in. Nothing is run. TPUs need libtpu, which the extra `aot` installs;
CPU devices are those of this process.
"""

import dataclasses
import importlib.metadata
import os
import re
import resource
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from moex.accounting import num_bytes
from moex.activations import abstract_batch
from moex.config import ConfigError
from moex.sharding import batch_sharding
from moex.topology import Topology
from moex.train.job import make_program

# libtpu asks these on its way to a topology, and waits for a metadata server if they
# are not there. The values do not limit what may be described.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process ends
}

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute"),
)


class DoesNotFit(RuntimeError):
    """The compiler found no place for the job in the memory of a device."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one train step.

    Attributes:
      seconds: of lowering and of compiling, on this machine.
      host_bytes: most memory that this process used.
      argument_bytes: train state and batch on one device.
      expected_argument_bytes: the same by our shardings; the two must be equal.
      peak_bytes: most memory at any time on one device.
      temp_bytes: of buffers that are neither arguments nor results.
      collectives: number by kind in the program's text, which has the body of a scan
        once however often it runs.
    """

    lower_seconds: float
    compile_seconds: float
    host_bytes: int
    argument_bytes: int
    expected_argument_bytes: int
    peak_bytes: int
    temp_bytes: int
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
            "--compile: the compiler for TPUs, libtpu, is not installed; pip install "
            "'moex[aot]', or 'libtpu==0.0.42.*' for JAX 0.10, 'libtpu==0.0.50.*' for "
            "JAX 0.12."
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
    return list(found.devices)


def train_arguments(program) -> tuple:
    """The abstract arguments of `Program.train_step`, each with its sharding."""
    mesh, cfg = program.mesh, program.cfg
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = {
        name: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=batch_sharding(mesh, a.ndim)
        )
        for name, a in abstract_batch(cfg.batch_size, cfg.seq_len).items()
    }
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=program.whole)
        for a in (jax.ShapeDtypeStruct((), jnp.int32), key)
    ]
    return program.abstract_state(), *placed, batch


def local_bytes(tree) -> int:
    """Bytes on one device of arrays, abstract or not, that have shardings."""
    return num_bytes(
        [
            jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape), a.dtype)
            for a in jax.tree.leaves(tree)
        ]
    )


def compile_step(cfg, topology: Topology) -> Compiled:
    """Compile the train step of a checked config for a topology.

    Raises:
      ConfigError: if that is not possible here.
      DoesNotFit: if the compiler needs more memory than a device has.
    """
    devices = described_devices(topology)
    mesh = cfg.mesh.make(devices)
    with jax.set_mesh(mesh):
        program = make_program(cfg, mesh)
        arguments = train_arguments(program)
        start = time.perf_counter()
        lowered = program.train_step().lower(*arguments)
        middle = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise _refusal(error, topology) from None
        end = time.perf_counter()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    state, step, _, batch = arguments
    expected = local_bytes((state, step, batch)) + _key_bytes()
    return Compiled(
        lower_seconds=middle - start,
        compile_seconds=end - middle,
        host_bytes=_host_bytes(),
        argument_bytes=memory.argument_size_in_bytes,
        expected_argument_bytes=expected,
        peak_bytes=memory.peak_memory_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        collectives=count_collectives(text),
    )


def _key_bytes() -> int:
    return num_bytes(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))))


def _host_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count_collectives(text: str) -> dict[str, int]:
    """Collectives in the text of a compiled program, by kind; those there are."""
    counts = {
        kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES
    }
    return {kind: count for kind, count in counts.items() if count}


def _refusal(error, topology: Topology) -> Exception:
    """The compiler's error in words, if it is one of memory; else the error."""
    text = str(error)
    if "Ran out of memory" not in text:
        return error
    sizes = re.search(r"\(([\d.]+\w)\) exceeds available \w+ \(([\d.]+\w)\)", text)
    needs = f"needs {sizes[1]}iB of {sizes[2]}iB" if sizes else text.splitlines()[0]
    return DoesNotFit(f"{topology.name}: the job does not fit: one device {needs}.")
