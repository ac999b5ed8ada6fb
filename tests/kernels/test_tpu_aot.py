"""The TPU backend through libtpu's compiler, for chips that are not there.

Lowering checks block shapes; only this finds a kernel that needs more VMEM than there
is, or an operation that the compiler of kernels does not know. Needs libtpu:
`pip install 'libtpu==0.0.42.*'` for JAX 0.10, `'libtpu==0.0.50.*'` for JAX 0.12.

Legend: T tokens, K slots per token, N sorted rows (T*K), D model width, F expert hidden
width, E experts.
"""

import jax.numpy as jnp
import pytest

from benchmarks import aot
from kernels_pallas.grouped_matmul.shapes import LayerShape

pytestmark = pytest.mark.aot

TOPOLOGIES = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")

# Widths of real layers, which decide on tiles, with fewer rows and experts, which
# decide on time; and sizes that no tile divides.
SHAPES = {
    "7b_fine": LayerShape(1024, 8, 1536, 256, 16),
    "120b": LayerShape(1024, 4, 4096, 1024, 4),
    "deepseek_v3": LayerShape(1024, 2, 7168, 2048, 4),
    "mixtral": LayerShape(512, 2, 4096, 14336, 2),
    "unaligned": LayerShape(300, 2, 333, 1100, 6),
    "odd": LayerShape(7, 2, 5, 3, 4),
}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def device(request):
    try:
        return aot.tpu_device(request.param)
    except aot.Unavailable as error:
        pytest.skip(str(error))


# The peak counts what XLA holds in VMEM for a while, copies of arrays in HBM; v5e and
# v6e have 128 MiB of it, v5p 64.
VMEM_BYTES = 128 * 2**20


def bound_bytes(program, shape, dtype):
    """What a program may need in HBM beside arguments and results.

    grouped_matmul: nothing of the size of its arrays. grouped_glu: the gathered x and
    dy and one output of a projection, [N, D]; a, da, h and weighted h, 6 times [N, F];
    the input projections with their last two axes merged, and their gradient; and
    where F is no multiple of 128, the halves of these. 4 MiB for all that is small.
    """
    T, K, D, F, E = shape
    size, rows = jnp.dtype(dtype).itemsize, T * K
    small = 4 * 2**20
    if program.startswith("grouped_matmul"):
        return small
    weights = 2 * E * D * 2 * F * (2 if F % 128 else 1)
    return size * (3 * rows * D + 6 * rows * F + weights) + small


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SHAPES)
def test_layers_compile_and_fit(device, name, dtype):
    shape = SHAPES[name]
    made = aot.programs("tpu", shape, jnp.dtype(dtype))
    for program in ("grouped_matmul fwd+bwd", "grouped_glu fwd+bwd"):
        record = aot.compile_for(device, *made[program])
        print(device.device_kind, program, name, dtype, record)
        assert "error" not in record
        # Not temp_bytes: the compiler may report more of them than its own peak.
        allowed = record["argument_bytes"] + record["output_bytes"] + VMEM_BYTES
        assert record["peak_bytes"] <= allowed + bound_bytes(program, shape, dtype)


def test_the_compiler_refuses_what_does_not_fit(device):
    shape = LayerShape(2**20, 8, 8192, 8192, 8)  # 128 GiB of gathered rows
    made = aot.programs("tpu", shape, jnp.dtype("bfloat16"))
    record = aot.compile_for(device, *made["grouped_glu fwd"])
    assert "Ran out of memory" in record["error"]
