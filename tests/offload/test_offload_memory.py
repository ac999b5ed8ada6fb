"""A model whose experts are larger than the memory that its process may have."""

import dataclasses
import subprocess
import sys

import pytest

from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.stack import Segment
from moex.train.job import make_job
from tests import runs
from tests.helpers import built

# The process may have this much more private memory than JAX itself needs: less than
# the experts. Half of it is taken by compiling and by what XLA keeps.
ROOM = 390 * 10**6
CHILD = """
import pathlib, re, resource, sys

from moex import allocator

allocator.keep_memory()
import jax
import jax.numpy as jnp

import moex.offload.setup
import moex.serve.text
from moex import cli

jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
status = pathlib.Path("/proc/self/status").read_text()
room = int(re.search(r"VmData:\\s+(\\d+)", status)[1]) * 1024 + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (room, room))
cli.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    cfg = runs.config(folder, "checkpoint.every=0", "eval.every=0", "kernels=auto")
    moe = MoE(num_experts=64, router=TopK(k=2), experts=Glu(hidden=512))
    layers = (Segment(pattern=(moe,), repeat=4),)
    cfg.model = dataclasses.replace(cfg.model, dim=256, layers=layers)
    with runs.one_device():
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        experts = params["segments"]["0"]["blocks"]["0"]["ffn"]["experts"]
        assert sum(array.nbytes for array in experts.values()) > ROOM
        runs.write(job, {"params": params, "state": state}, folder / "run")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_model_larger_than_the_memory_runs(run, tmp_path):
    def write(room, *flags):
        asked = "--prompt=the cat", "--max-new-tokens=8", *flags
        return subprocess.run(
            [sys.executable, "-c", CHILD, str(room), "generate", str(run), *asked],
            env=runs.environment(MOEX_CACHE=str(tmp_path)),
            capture_output=True,
            text=True,
            check=False,
        )

    assert write(ROOM).returncode != 0  # the whole model has no room
    whole = write(10**11)
    assert whole.returncode == 0, whole.stderr
    for _ in range(2):  # the bank is written, and then it is there
        own = write(ROOM, "--offload=10%")
        assert own.returncode == 0, own.stderr
        assert own.stdout == whole.stdout
