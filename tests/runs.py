"""Tiny training runs, made the way a user makes them: a config file, a text file.

Tests that train use one device: most of the time of such a run is compiling.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex import cli
from moex.config.base import to_dict
from moex.config.flags import load_config
from moex.runs import score
from moex.runs.checkpoint import Checkpointer
from moex.runs.directory import RunDir
from moex.runs.write import write_run
from moex.train import loop, training
from moex.train.job import Training, make_job

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = """
from moex.configs import base
from moex.data.pipeline import Data
from moex.data.sources import Text
from moex.data.tokenizer import Bytes
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.model.optim import AdamW, Optim
from moex.runs.keys import Checkpoint, Eval, Log


def get_config(arg=""):
    cfg = base.get_config()
    moe = MoE(num_experts=4, router=TopK(k=2, bias_rate=0.01), experts=Glu(hidden=32))
    cfg.model = LM(
        dim=32,
        attention=Attention(heads=2),
        layers=(Segment(pattern=(Dense(hidden=64),)), Segment(pattern=(moe,))),
    )
    cfg.data = Data(
        sources=(Text(paths=(CORPUS,), delimiter="\\n\\n", holdout=0.1),),
        tokenizer=Bytes(),
    )
    cfg.steps = 8
    cfg.batch_size = 4
    cfg.seq_len = 32
    cfg.kernels = "xla"  # the quickest to compile
    cfg.optim = Optim(rule=AdamW(), lr=1e-2, schedule="constant", warmup_steps=2)
    cfg.eval = Eval(every=4, sequences=6)
    cfg.checkpoint = Checkpoint(every=2, keep=3, keep_best=0)
    cfg.log = Log(every=1, images_every=0, sample_tokens=0, tensorboard=False)
    return cfg
"""

# What is measured, not computed: free to differ between equal runs.
MEASURED = "perf/"


def write_corpus(path, num_documents=300, seed=0):
    """Documents of a few sentences of six words, between empty lines."""
    rng = random.Random(seed)
    words = [
        ("the cat", "a dog", "my old friend", "the small bird", "our teacher"),
        ("sees", "likes", "follows", "hears", "finds"),
        ("the red house", "a long river", "the quiet garden", "some bread"),
    ]

    def document():
        lines = [" ".join(map(rng.choice, words)) for _ in range(rng.randint(2, 8))]
        return ".\n".join(lines) + "."

    path.write_text("\n\n".join(document() for _ in range(num_documents)))
    return path


MOE_LAYER = "Segment(pattern=(moe,))"
BOTH_LAYERS = f"Segment(pattern=(Dense(hidden=64),)), {MOE_LAYER}"


def write_config(folder, *, dense=True) -> pathlib.Path:
    """A config file and its corpus in `folder`; the path of the config file.

    Without the dense layer the model is one MoE layer: quicker to trace and compile,
    for tests that start many processes.
    """
    text = write_corpus(folder / "corpus.txt")
    path = folder / "tiny.py"
    assert BOTH_LAYERS in CONFIG
    made = CONFIG if dense else CONFIG.replace(BOTH_LAYERS, f"{MOE_LAYER},")
    path.write_text(made.replace("CORPUS", repr(str(text))))
    return path


def config(folder, *overrides):
    """The run config of `write_config`, with overrides as on the command line."""
    path = folder / "tiny.py"
    if not path.exists():
        write_config(folder)
    return load_config([f"--config={path}", *(f"--config.{o}" for o in overrides)])


def train(folder, workdir, *overrides, said=None, **options):
    """Train in this process; lines before the run's own log are appended to `said`."""
    say = (lambda line: None) if said is None else said.append
    return training.train(config(folder, *overrides), workdir, say=say, **options)


def write_trained(folder) -> pathlib.Path:
    """`write_config`, and a run of it by `moex train`; the path of the run.

    It is trained once in a session, on one device, and copied into each folder.
    """
    session = pathlib.Path(os.environ["MOEX_TEST_SESSION"])
    made = session / "trained"
    with (session / "trained.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not (made / "complete").exists():
            made.mkdir(exist_ok=True)
            config = f"--config={write_config(made)}"
            with one_device():
                cli.main(["train", config, f"--workdir={made / 'run'}"])
            (made / "complete").touch()
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder / "run"


def write(job, arrays, workdir):
    """Write a run at step 0 of {"params", "state"}, as imports and conversions do."""
    run = RunDir(workdir)
    write_run(run, job.cfg, job, job.tx, job.data, arrays)


def watch_batches(patch, poison=()):
    """Record all training batches; those of these positions lose their numbers."""
    seen = []

    def shard(batch, mesh):
        if len(seen) in poison:
            batch = batch | {"loss_mask": batch["loss_mask"] * np.float32(np.nan)}
        seen.append({k: np.array(v) for k, v in batch.items()})
        return place(batch, mesh)

    place = loop.shard_batch
    patch.setattr(loop, "shard_batch", shard)
    return seen


def records(workdir, kind="train") -> list[dict]:
    """Lines of metrics.jsonl of one kind, in order, without what was measured."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if not k.startswith(MEASURED)}
        for line in lines
        if line["kind"] == kind
    ]


def saved_state(folder, workdir, *overrides, step=None):
    """`(step, {"params", "opt", "state"} of numpy arrays, data)` of a checkpoint."""
    return saved_state_of(config(folder, *overrides), workdir, step=step)


def saved_state_of(cfg, workdir, *, step=None):
    """The same for any run config."""
    job = make_job(cfg, log=lambda line: None)
    checkpointer = Checkpointer(workdir, read_only=True)
    try:
        if step is None:
            step = checkpointer.steps()[-1]
        arrays, data, _ = checkpointer._restore_step(
            step, job.abstract_state(), ("params", "opt", "state")
        )
    finally:
        checkpointer.close()
    return step, jax.tree.map(np.asarray, arrays), data


def assert_same_state(actual, expected):
    """Both from `saved_state`; bit for bit."""
    assert actual[0] == expected[0]
    assert actual[2] == expected[2]
    assert_same_arrays(actual[1], expected[1])


def assert_same_arrays(actual, expected):
    """Trees of arrays; bit for bit."""
    paths, _ = jax.tree_util.tree_flatten_with_path(expected)
    leaves = jax.tree.leaves(actual)
    assert len(paths) == len(leaves)
    for (path, value), leaf in zip(paths, leaves, strict=True):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == value.dtype, name
        assert leaf.tobytes() == value.tobytes(), name


def flip_bit(folder) -> None:
    """Change one bit in the middle of the largest file under `folder`."""
    file = max((p for p in folder.rglob("*") if p.is_file()), key=_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def _size(path):
    return path.stat().st_size


# What a program does not depend on.
NOT_TRACED = ("checkpoint", "eval", "init_from", "log", "nan_limit")


@contextlib.contextmanager
def one_trace_of_equal_configs():
    """Runs of equal configs share their jitted steps, as the steps of one run do.

    Tracing and lowering take longer than all else in a tiny run whose programs are in
    the cache of this session. Initial states are copied: a step donates its state.
    """

    def once(method):
        made = {}

        def cached(program):
            cfg = {k: v for k, v in program.cfg.items() if k not in NOT_TRACED}
            if cfg["optim"].schedule == "constant":
                del cfg["steps"]
            arrays = str(program.spec.params)  # --weights changes their types
            key = (json.dumps(to_dict(cfg), sort_keys=True), program.mesh, arrays)
            if key not in made:
                made[key] = method(program)
            return made[key]

        return cached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "train_step", once(Training.train_step))
        shared = once(score.eval_step)
        for module in (score, loop):
            patch.setattr(module, "eval_step", shared)
        first = once(Training.init_state)
        copied = lambda program: jax.tree.map(jnp.copy, first(program))  # noqa: E731
        patch.setattr(Training, "init_state", copied)
        yield


@contextlib.contextmanager
def one_device():
    """The world of a laptop: one of the eight fake devices."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        patch.setattr(jax, "device_count", lambda: 1)
        yield


def environment(**extra) -> dict:
    """Environment of a `moex` process: one device, programs of this test session."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | extra


def start(*args, **popen) -> subprocess.Popen:
    """`moex ARGS` as a process with piped output; wait for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "moex.cli", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **popen,
    )
