"""The Triton kernels lowered and compiled for an H100 that is not there.

Lowering is always tested. Compiling (`-m aot`) needs the CUDA 12 plugin of the JAX in
use (jax-cuda12-plugin and jax-cuda12-pjrt; no driver, no CUDA) and says more: that XLA
and Triton accept every kernel, and how much shared memory each takes; where XLA writes
PTX when it compiles ahead of time (JAX 0.10 does, 0.12 does not), that it uses the
tensor cores of Hopper; and with a `ptxas` on the path also that no register is spilled.
Nothing is run.

As a program it compiles one layer: NAME DTYPE ACTIVATION, with a name of shapes.REAL.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas import make_plan
from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.grouped_glu import triton as glu
from kernels_pallas.grouped_glu import vjp as glu_vjp
from kernels_pallas.grouped_matmul import triton as matmul
from kernels_pallas.grouped_matmul import vjp as matmul_vjp
from kernels_pallas.grouped_matmul.shapes import REAL
from tests.marks import thorough_but_for

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

HERE = pathlib.Path(__file__).parent
KERNELS = {
    *("grouped_glu_up", "grouped_glu_down_vjp", "grouped_matmul"),
    "grouped_matmul_weight",
}
SHARED_LIMIT = 99 * 1024  # of a block, where it is least from Ampere on


def h100():
    """A context with an H100 to lower for."""
    device = AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


def layer(name, dtype, activation, sharding=None):
    """Value and gradients of one layer, and the shapes of its arguments."""
    T, slots, D, F, E = REAL[name]
    function = glu_vjp.differentiable(glu.forward, glu.backward)

    def loss(x, w_in, w_out, gate, expert_TK):
        plan = make_plan(expert_TK, jnp.ones(expert_TK.shape, bool), E)
        y_TD = function(x, w_in, w_out, gate, plan, activation, None)
        return jnp.sum(y_TD.astype(jnp.float32))

    struct = partial(jax.ShapeDtypeStruct, dtype=dtype, sharding=sharding)
    arguments = (
        *(struct((T, D)), struct((E, D, 2, F)), struct((E, F, D))),
        *(struct((T, slots), dtype=d) for d in ("float32", "int32")),
    )
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))), arguments


def lower(function, arguments):
    with h100():
        traced = function.trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(REAL)[-3:])
@pytest.mark.parametrize("dtype", matmul.DTYPES)
def test_product_lowers_for_an_h100(name, dtype):
    T, slots, D, F, E = REAL[name]
    function = matmul_vjp.differentiable(matmul.product, matmul.weight_product)

    def loss(lhs_MK, rhs_GKN, bounds):
        out_MN = function(lhs_MK, rhs_GKN, bounds, False, jnp.dtype(dtype))
        return jnp.sum(out_MN.astype(jnp.float32))

    shapes = ((T * slots, D), (E, D, 2 * F))
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    bounds = jax.ShapeDtypeStruct((E + 1,), jnp.int32)
    text = lower(jax.jit(jax.value_and_grad(loss, (0, 1))), (*arguments, bounds))
    assert text.count("gpu.triton") >= 3


@pytest.mark.parametrize(
    "name",
    thorough_but_for(list(REAL)[::3], "cpu_small", later=["H2", "H5", "cpu_finest"]),
)
def test_layer_lowers_for_an_h100(name):
    activation = list(ACTIVATIONS)[list(REAL).index(name) % 3]
    text = lower(*layer(name, "bfloat16", activation))
    assert all(kernel in text for kernel in KERNELS)


def compile_layer(name, dtype, activation):
    """Compiles value and gradients of one layer for the described H100."""
    jax.devices()  # registers the plugin
    described = topologies.get_topology_desc(
        "", "cuda", topology="1x1x1", target_config=(HERE / "h100.txtpb").read_text()
    )
    mesh = jax.sharding.Mesh(np.array(described.devices[:1]), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    function, arguments = layer(name, dtype, activation, whole)
    with h100():
        function.lower(*arguments).compile()


def registers_spilled(ptx_file, folder):
    """What ptxas says of the spills of the kernels in a file, in bytes."""
    command = ["ptxas", "-v", "-arch=sm_90a", ptx_file, "-o", folder / "out.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(b) for b in re.findall(r"(\d+) bytes spill stores", done.stderr)]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "dtype", "activation"),
    [
        ("H1", "bfloat16", "silu"),
        ("H5", "bfloat16", "clamped"),
        ("H8", "bfloat16", "gelu"),
        ("H10", "float32", "silu"),
    ],
)
def test_layer_compiles_and_fits_an_h100(name, dtype, activation, tmp_path):
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        pytest.skip("needs jax-cuda12-plugin and jax-cuda12-pjrt of this JAX version")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_dump_to={tmp_path}",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path]),
    }
    command = [sys.executable, __file__, name, dtype, activation]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    launches = "".join(f.read_text() for f in tmp_path.glob("*thunk_sequence.txt"))
    taken = re.findall(r"(grouped_\w+) grid: .*shared_memory: (\d+) bytes", launches)
    assert {kernel for kernel, _ in taken} >= KERNELS
    for kernel, shared_bytes in taken:
        assert int(shared_bytes) <= SHARED_LIMIT, kernel

    for ptx_file in tmp_path.glob("*.ptx"):
        text = ptx_file.read_text()
        (kernel, *_) = re.findall(r"\.entry (\w+)", text) or [""]
        if any(kernel.startswith(name) for name in KERNELS - {"grouped_matmul"}):
            assert "wgmma.mma_async" in text, kernel
        if kernel.startswith("grouped_") and shutil.which("ptxas"):
            assert not any(registers_spilled(ptx_file, tmp_path)), kernel


if __name__ == "__main__":
    compile_layer(*sys.argv[1:])
