"""`moex plan`: topologies, bytes by hand and beside real arrays, and the command."""

import json
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest

from moex import cli
from moex.adapters.lora import LoRA
from moex.config.base import ConfigError
from moex.config.flags import load_config
from moex.model.accounting import num_bytes
from moex.model.spec import model_spec
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.layer import MoE
from moex.moe.routers.topk import Groups, TopK
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.plan import advice as advices
from moex.plan import liveness, planner, rehearsal, topology
from moex.plan import traffic as traffics
from moex.plan.advice import advice, least_devices
from moex.plan.planner import check, plan
from moex.sharding import AXIS_NAMES, MeshConfig
from moex.tasks.lm import token_losses
from moex.train.job import Training
from tests import runs
from tests.helpers import tiny_lm

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    runs.write_config(folder)
    return folder


@pytest.fixture(scope="module")
def run_config(folder):
    """`run_config(mesh, **run keys)`: a tiny dense and MoE layer; 8 sequences."""

    def run_config(mesh=None, **fields):
        cfg = runs.config(folder, "batch_size=16", "eval.batch_size=8")
        cfg.mesh = MeshConfig(**(mesh or {}))
        cfg.model.vocab = 264
        for name, value in fields.items():
            cfg[name] = value
        return cfg

    return run_config


@pytest.fixture(scope="module")
def by_microbatches(run_config):
    """Plans of eight copies, by the number of microbatches: 1 or 2."""
    where = topology.parse("v5p:2x2x2")
    return {n: plan(run_config({"data": 8}, grad_accum=n), where) for n in (1, 2)}


def sizes(**given):
    return dict.fromkeys(AXIS_NAMES, 1) | given


# Topologies.


@pytest.mark.parametrize(
    ("name", "devices", "shape", "slices"),
    [
        ("v5p:4x4x4", 64, (4, 4, 4), 1),
        ("v5e:16x16*2", 512, (16, 16), 2),
        ("v6e:8x8", 64, (8, 8), 1),
        ("h100:8x4", 32, (8, 4), 1),
        ("h200:8", 8, (8, 1), 1),
        ("cpu:8", 8, (8,), 1),
    ],
)
def test_topologies(name, devices, shape, slices):
    found = topology.parse(name)
    assert (found.num_devices, found.shape, found.slices) == (devices, shape, slices)
    assert found.name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:4x4x4", "--topology = 'v5q:4x4x4': no such device 'v5q'. Did you mean"),
        ("v5p:64", "must be v5p: and 3 sizes, such as v5p:4x4x4"),
        ("v5e:4x4x4", "must be v5e: and 2 sizes, such as v5e:8x8"),
        ("h100:8x4x2", "must be h100:GPUSxNODES, such as h100:8x4"),
        ("cpu", "must be cpu:N, N devices, such as cpu:8"),
        ("v5p:4x0x4", "must be v5p: and 3 sizes, such as v5p:4x4x4"),
        ("h100:8x4*2", "only v5e, v5p and v6e have several slices"),
    ],
)
def test_bad_topologies(name, message):
    with pytest.raises(ConfigError, match=".") as error:
        topology.parse(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_accelerator_has_its_figures():
    for kind, chip in topology.CHIPS.items():
        if chip.platform == "cpu":
            continue
        shape = (1,) * (chip.dims or 2)
        assert topology.Topology(kind, kind, shape).peak_flops, kind
        assert chip.memory and chip.memory_rate and chip.link, kind


def test_time_on_a_torus():
    """v5p:4x4x4, links of 100 GB/s one way; whole dimensions of 4 are rings."""
    where, mesh = topology.parse("v5p:4x4x4"), sizes(fsdp=16, expert=4)
    # Two rings: 4 links bring 1 GB.
    assert where.seconds("fsdp", mesh, 1e9, False) == pytest.approx(1e9 / 400e9)
    # One ring of 4: a third of 1 GB to each other chip, 1 + 1 + 2 hops, over 2 links.
    assert where.seconds("expert", mesh, 1e9, True) == pytest.approx(4 / 3 / 2 * 1e-2)


def test_time_on_a_line():
    """v5e:4x4: dimensions of 4 are not closed; the end of a line has one link."""
    where, mesh = topology.parse("v5e:4x4"), sizes(fsdp=4, expert=4)
    assert where.seconds("fsdp", mesh, 1e9, False) == pytest.approx(1e9 / 50e9)
    # Over the middle 2 chips send 2/3 of 1 GB each.
    assert where.seconds("expert", mesh, 1e9, True) == pytest.approx(4 / 3e9 * 1e9 / 50)


def test_time_between_nodes():
    """h100:8x4: 450 GB/s a GPU inside a node, 50 GB/s a GPU between nodes."""
    where, mesh = topology.parse("h100:8x4"), sizes(data=2, fsdp=4, expert=4)
    # expert: 4 neighbours in a node. fsdp: stride 4, 2 of 4 in a node; data: none.
    assert [where.near(a, mesh) for a in ("expert", "fsdp", "data")] == [4, 2, 1]
    assert where.seconds("expert", mesh, 1e9, True) == pytest.approx(1 / 450)
    # 2/3 of 1 GB come from the other node, half of them to each of the two here.
    assert where.seconds("fsdp", mesh, 1e9, False) == pytest.approx(1 / 3 / 50)
    assert where.seconds("fsdp", mesh, 1e9, True) == pytest.approx(2 / 3 / 50)
    assert where.seconds("data", mesh, 1e9, False) == pytest.approx(1 / 50)


def test_time_between_slices():
    """v5e:4x4*2: only `data` leaves a slice, at 25 Gbit/s a chip."""
    where, mesh = topology.parse("v5e:4x4*2"), sizes(data=2, fsdp=16)
    assert where.seconds("data", mesh, 1e9, False) == pytest.approx(8 / 25)
    assert where.near("fsdp", mesh) == 16


# Memory.

MESHES = [
    {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
]
MORE_MESHES = [
    {"data": 1, "fsdp": 8},
    {"data": 8},
    {"data": 2, "expert": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "expert": 4},
]


@pytest.mark.parametrize(
    "mesh",
    [
        *(pytest.param(mesh, marks=pytest.mark.thorough) for mesh in MESHES),
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE_MESHES),
    ],
    ids=str,
)
def test_state_bytes_are_those_of_real_arrays(run_config, mesh):
    cfg = run_config(mesh)
    memory = plan(cfg, topology.parse("cpu:8")).memory
    real = cfg.mesh.make()
    state = Training(cfg=cfg, mesh=real, spec=model_spec(cfg.model, real)).init_state()
    device = jax.devices()[0]

    def held(tree):
        shards = [s for a in jax.tree.leaves(tree) for s in a.addressable_shards]
        return num_bytes([s.data for s in shards if s.device == device])

    assert memory.params == held(state["params"])
    assert memory.optimizer == held(state["opt"])
    assert memory.other_state == held((state["state"], state["guard"]))
    assert memory.state == held(state)
    assert memory.gradients == memory.params


@pytest.mark.thorough
def test_microbatches_keep_their_sum_of_gradients(by_microbatches):
    one, two = by_microbatches[1].memory, by_microbatches[2].memory
    assert two.gradients == 2 * one.gradients
    assert two.kept == one.kept / 2


@pytest.mark.slow
def test_what_is_split_halves(run_config):
    """Activations go with tokens: data, fsdp and expert all split them."""
    where = [topology.parse(f"cpu:{n}") for n in (4, 8)]
    four, eight = (plan(run_config({"data": -1}), t).memory for t in where)
    assert eight.kept == four.kept / 2
    assert eight.state == four.state


@pytest.mark.thorough
def test_tensor_splits_heads_widths_and_logits(run_config):
    """A dense layer of width 64: [L, V] logits, scores and hidden rows are halved."""
    layers = [Segment(pattern=(Dense(hidden=64),), repeat=2)]
    fields = {"model": tiny_lm(*layers), "precision": "float32"}
    one = plan(run_config({"data": 2}, **fields), topology.parse("cpu:2")).memory
    two = plan(
        run_config({"data": 2, "tensor": 2}, **fields), topology.parse("cpu:4")
    ).memory
    assert one.kept / 2 < two.kept < one.kept


@pytest.mark.thorough
def test_the_peak_is_near_what_a_cpu_allocates():
    """The shipped quickstart, whose logits and kept rows are most of it."""
    from moex.config.flags import load_config

    where = topology.parse("cpu:1")
    cfg = load_config(["--config=configs/quickstart.py"])
    planned = plan(cfg, where)
    compiled = rehearsal.compile_step(cfg, where)
    assert compiled.state_bytes == planned.memory.state
    assert compiled.peak_bytes == pytest.approx(planned.memory.peak, rel=0.15)


@pytest.mark.slow
def test_compiled_state_bytes_on_a_mesh(run_config):
    mesh = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    where, cfg = topology.parse("cpu:8"), run_config(mesh)
    planned = plan(cfg, where)
    compiled = rehearsal.compile_step(cfg, where)
    assert compiled.state_bytes == planned.memory.state
    assert compiled.collectives["all-gather"] > 0


# The walk.


def walk(function, *shapes, tpu=False):
    args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    made = liveness.graph(function, *args)
    return liveness.peak(made, lambda g, v: g.sizes[v], tpu)


def test_values_live_until_they_are_read():
    """[100, 100] float32 is 40 kB: of two products in a row both are alive."""
    assert walk(lambda a: a @ a @ a, (100, 100)) == 80_000
    assert walk(lambda a: (a @ a) @ (a @ a), (100, 100)) == 120_000


def test_elementwise_operations_need_nothing_of_their_own():
    assert walk(lambda a: jax.numpy.exp(a) * 2 + 1, (100, 100)) == 40_000
    # Over the product that nothing reads later.
    assert walk(lambda a: jax.numpy.exp(a @ a) * 2, (100, 100)) == 40_000


def test_a_loop_needs_its_body_once():
    def run(x):
        return jax.lax.scan(lambda x, _: ((x @ x) @ x, None), x, length=5)[0]

    # The carry, and the two products of the body.
    assert walk(run, (100, 100)) == 3 * 40_000


def test_gradients_of_targets_are_no_second_array_on_a_tpu():
    """Logits of 100 x 1000, 400 kB, are all that is large: one value a row is added."""

    def loss(w, x):
        return token_losses(x @ w, jnp.zeros((100,), "int32"))[0].sum()

    shapes = (10, 1000), (100, 10)
    assert 400_000 <= walk(jax.grad(loss), *shapes, tpu=True) < 500_000
    assert 800_000 <= walk(jax.grad(loss), *shapes) < 900_000


# Traffic. D = 32, layers: dense of 64 and 4 experts of 32; 2 heads of 16; V = 264.


def carried(cfg, name="cpu:8"):
    program = check(cfg, topology.parse(name))
    with jax.sharding.use_abstract_mesh(program.mesh):
        rows = traffics.traffic(program)
    return {(row.axis, row.what): row.received for row in rows}


@pytest.mark.slow
def test_gradients_of_copies_are_summed(run_config):
    cfg = run_config({"data": 8})
    params = plan(cfg, topology.parse("cpu:8")).memory.params
    assert carried(cfg) == {("data", "gradients summed"): 2 * 7 / 8 * params}


def test_weights_are_gathered_twice_and_gradients_scattered(run_config):
    cfg = run_config({"data": 1, "fsdp": 8}, remat="full", precision="bfloat16")
    program = check(cfg, topology.parse("cpu:8"))
    split = sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(program.abstract_state()["params"])
        if "fsdp" in leaf.sharding.spec
    )
    found = carried(cfg)
    assert found["fsdp", "weights gathered"] == 2 * 2 * 7 / 8 * split
    assert found["fsdp", "gradients scattered"] == 2 * 7 / 8 * split


@pytest.mark.slow
def test_a_frozen_base_sends_no_gradients(run_config):
    cfg = run_config({"data": 1, "fsdp": 8})
    before = carried(cfg)
    cfg.model.adapter = LoRA(rank=2, alpha=2.0, targets=("attention",))
    found, adapters = carried(cfg), plan(cfg, topology.parse("cpu:8")).memory.gradients
    sent = {k: v for k, v in found.items() if k[1].startswith("gradients")}
    # An array that is split is scattered; one that is not is summed, at twice that.
    assert 7 / 8 * adapters < sum(sent.values()) < 8 * 2 * 7 / 8 * adapters
    key = "fsdp", "gradients scattered"
    assert found.get(key, 0.0) < before[key] / 4
    assert found["fsdp", "weights gathered"] >= before["fsdp", "weights gathered"]


def test_tokens_to_experts(run_config):
    """128 tokens a device in 2 microbatches of 64; k = 2 of 4 experts on 4 devices.

    A token's two experts are on two devices, 2 * 3/4 of them others. There and back a
    row of 32 float32; with it 2 ids and gates; forward and backward.
    """
    mesh = {"data": 1, "expert": 4, "exchange": "all_to_all"}
    cfg = run_config(mesh, grad_accum=2)
    found = carried(cfg, "cpu:4")["expert", "tokens to experts"]
    assert found == pytest.approx(128 * 2 * 0.75 * (2 * 32 * 4 + 2 * 8) * 2)
    cfg = run_config(mesh | {"exchange": "gather"}, remat="full")
    found = carried(cfg, "cpu:4")["expert", "tokens gathered"]
    assert found == pytest.approx(128 * 3 * (2 * 32 * 4 + 2 * 8) * 3)


@pytest.mark.parametrize("devices", [2, 4, 8, 16])
@pytest.mark.parametrize("groups", [None, Groups(num=8, keep=3), Groups(num=4, keep=2)])
def test_mean_devices_by_drawing(devices, groups):
    """Beside random choices of 3 of 16 experts."""
    import numpy as np

    rng = np.random.default_rng(0)
    moe = MoE(num_experts=16, router=TopK(k=3, groups=groups), experts=Glu(hidden=4))
    seen = []
    for _ in range(4000):
        ids = np.arange(16)
        if groups is not None:
            kept = rng.choice(groups.num, groups.keep, replace=False)
            ids = ids[np.isin(ids // (16 // groups.num), kept)]
        chosen = rng.choice(ids, 3, replace=False)
        seen.append(len({*(chosen // (16 // devices))}))
    # Four standard errors of the mean; a count varies by less than 1.
    assert traffics.mean_devices(moe, devices) == pytest.approx(
        np.mean(seen), abs=4 / 4000**0.5
    )


def test_latent_tokens_travel_as_latents():
    moe = MoE(
        num_experts=8, router=TopK(k=2), experts=Latent(hidden=8, latent=4, group=4)
    )

    def widths(dim, slots):
        return moe.experts.travel_widths(8, dim, slots, num_devices=4)

    assert widths(32, 2) == (8, 32)
    assert widths(8, 2) == (8, 8)  # no shorter
    assert widths(32, 1) == (32, 32)  # more spaces


# What to change, and the command.


def small_device(monkeypatch, gib):
    import dataclasses

    chip = dataclasses.replace(topology.CHIPS["v5p"], memory=gib * GIB)
    monkeypatch.setitem(topology.CHIPS, "v5p", chip)


@pytest.mark.slow
def test_advice_lists_what_fits(run_config, monkeypatch):
    where = topology.parse("v5p:2x2x2")
    cfg = run_config({"data": 8})
    peak = plan(cfg, where).memory.peak
    small_device(monkeypatch, 0.8 * peak / GIB)
    found = plan(cfg, where)
    assert found.fits is False
    lines = advice(cfg, found)
    assert any("--config.mesh.fsdp=8" in line for line in lines)
    for line in lines:  # each fits by its own plan
        assert float(line.split(": ")[1].split()[0]) <= 0.8 * peak / GIB + 0.05


@pytest.mark.slow
def test_advice_where_nothing_helps(run_config, monkeypatch):
    small_device(monkeypatch, 1e-6)
    cfg, where = run_config({"data": 8}), topology.parse("v5p:2x2x2")
    (line,) = advice(cfg, plan(cfg, where))
    assert "v5p devices at the least" in line


def test_the_fewest_devices_hold_state_and_all_gradients_once(
    by_microbatches, monkeypatch
):
    check_fewest_devices(by_microbatches[2], 2, monkeypatch)


@pytest.mark.slow
def test_the_fewest_devices_are_those_of_shards_too(run_config, monkeypatch):
    cfg = run_config({"data": 1, "fsdp": 8})
    check_fewest_devices(plan(cfg, topology.parse("v5p:2x2x2")), 1, monkeypatch)


def check_fewest_devices(found, accum, monkeypatch):
    """Two moments, and of microbatches two gradients; however many copies there are."""
    small_device(monkeypatch, 1e-6)
    memory, line = found.memory, least_devices(found)
    assert memory.gradients == accum * memory.params
    count = int(line.split(", and ")[1].split()[0])
    whole = 4 * found.num_params * (3 + accum)  # bytes, but for counters and biases
    assert whole <= count * 1e-6 * GIB < 1.02 * whole + 1e-6 * GIB
    assert f"take {(memory.state + memory.gradients) / GIB:.1f} GiB" in line


@pytest.fixture
def moex(folder, capsys):
    def moex(*args):
        capsys.readouterr()
        cli.main(["plan", f"--config={folder / 'tiny.py'}", *map(str, args)])
        return capsys.readouterr().out

    return moex


@pytest.mark.thorough
def test_the_command(moex, monkeypatch):
    """One plan, as text and as data."""
    made = []

    def once(cfg, where):
        made[:] = made or [plan(cfg, where)]
        return made[0]

    monkeypatch.setattr(planner, "plan", once)
    text = moex("--topology=v5p:2x2x1", "--config.seq_len=128")
    for part in ("parameters", "optimizer state", "peak", "data: gradients", "It fits"):
        assert part in text, part
    data = json.loads(moex("--topology=v5p:2x2x1", "--json", "--config.seq_len=128"))
    assert len(made) == 1
    assert data["num_devices"] == 4
    assert data["fits"] is True
    assert data["setting"]["dtype"] == "bfloat16"  # of a TPU, not of this machine
    assert data["memory"]["state"] > 0
    assert data["step_seconds"][0] <= data["step_seconds"][1]


@pytest.mark.slow
def test_gpus_without_cudnn(moex):
    """Attention on a GPU is cuDNN's, which is not asked for here."""
    args = ("--config.batch_size=16", "--config.mesh.data=2", "--config.mesh.fsdp=8")
    data = json.loads(moex("--topology=h100:8x2", "--json", *args))
    assert data["fits"] is True
    assert {row["axis"] for row in data["traffic"]} == {"data", "fsdp"}


@pytest.mark.slow
def test_a_cpu_has_no_published_speed(moex):
    text = moex("--topology=cpu:4")
    assert "not known" in text
    assert json.loads(moex("--topology=cpu:4", "--json"))["mfu"] is None


@pytest.mark.slow
def test_the_plan_is_printed_if_the_compiler_finds_no_room(
    moex, folder, monkeypatch, capsys
):
    def refused(cfg, where):
        raise rehearsal.DoesNotFit(f"{where.name}: the job does not fit: one device.")

    monkeypatch.setattr(rehearsal, "compile_step", refused)
    monkeypatch.setattr(rehearsal, "described_devices", lambda where: [])
    monkeypatch.setattr(advices, "advice", lambda *_: ["--config.remat=full"])
    for args in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            moex("--topology=v5p:2x2x1", "--compile", "--config.batch_size=8", *args)
        assert stop.value.code == 1
        said = capsys.readouterr()
        message = "v5p:2x2x1: the job does not fit: one device. To change: --config.rem"
        assert said.err.startswith(f"moex: error: {message}")
        if args:
            data = json.loads(said.out)
            assert data["memory"]["peak"] > 0 and data["compiled"] is None
            assert data["refused"].startswith(message)
            assert data["advice"]
        else:
            assert "peak" in said.out and "parameters" in said.out


def test_devices_that_the_compiler_counts_otherwise(monkeypatch):
    described = types.SimpleNamespace(devices=[None] * 8)
    monkeypatch.setattr(rehearsal.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(
        rehearsal.topologies, "get_topology_desc", lambda **options: described
    )
    for name in rehearsal.TPU_ENVIRONMENT:  # what is set there is undone here
        monkeypatch.setenv(name, "")
    message = "v4:2x2x1 as 8 devices, and the plan counts 4, one a chip"
    with pytest.raises(ConfigError, match=message):
        rehearsal.described_devices(topology.parse("v4:2x2x1"))
    assert len(rehearsal.described_devices(topology.parse("v5p:2x2x2"))) == 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--topology: missing; give devices, such as v5p:4x4x4."),
        (["--topology=v5p:4x4"], "--topology = 'v5p:4x4': must be v5p: and 3 sizes"),
        (
            ["--topology=cpu:8", "--config.mesh.data=3"],
            "must multiply to the number of devices, which is 8",
        ),
        (
            ["--topology=cpu:8", "--config.mesh.expert=8", "--config.batch_size=8"],
            "config.mesh.expert = 8: must divide the 'expert' dim",
        ),
        (["--topology=cpu:8"], "config.batch_size = 4: must be a multiple of"),
        (
            ["--topology=v5e:2x2*2", "--config.mesh.data=1", "--config.mesh.fsdp=8"],
            "config.mesh.data = 1: must be a multiple of the number of TPU slices = 2",
        ),
        (
            ["--topology=h100:4", "--compile"],
            "--compile: is for TPUs and CPUs, not for h100:4",
        ),
        (
            ["--topology=cpu:64", "--config.batch_size=64", "--compile"],
            "64 CPU devices",
        ),
    ],
)
def test_mistakes(moex, capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        moex(*args)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("moex: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--topology" in text and "--compile" in text


# The compiler for TPUs, where it is installed.


def tpu_compiler():
    try:
        rehearsal.described_devices(topology.parse("v5e:1x1"))
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.aot
def test_a_tpu_program_has_the_planned_state(run_config):
    tpu_compiler()
    where, cfg = topology.parse("v5e:1x1"), run_config()
    planned = plan(cfg, where)
    compiled = rehearsal.compile_step(cfg, where)
    assert compiled.state_bytes == planned.memory.state
    assert compiled.argument_bytes >= compiled.state_bytes


@pytest.mark.aot
def test_a_job_that_does_not_fit_is_said_in_words(folder, capsys):
    tpu_compiler()
    with pytest.raises(SystemExit) as stop:
        cli.main(
            [
                *("plan", "--config=configs/moe_1b.py", "--topology=v5e:1x1"),
                *("--compile", "--config.mesh.data=1", "--config.batch_size=64"),
            ]
        )
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert "v5e:1x1: the job does not fit: one device needs" in err
    assert "Traceback" not in err


@pytest.mark.aot
def test_the_shared_expert_is_computed_while_rows_travel():
    """Between the start and the end of an exchange, forward and backward.

    Of sizes where it pays: in a tiny layer the compiler leaves them apart.
    """
    tpu_compiler()
    sizes = ("model.vocab=32000", "model.layers[0].repeat=2", "batch_size=8")
    mesh = ("mesh.data=1", "mesh.fsdp=1", "mesh.expert=4", "mesh.exchange=all_to_all")
    more = ("precision=bfloat16", "grad_accum=1")
    options = [f"--config.{option}" for option in (*sizes, *mesh, *more)]
    cfg = load_config(["--config=configs/moe_1b.py", *options])
    cfg.model.layers[0].pattern[0].shared = Dense(hidden=2048)
    devices = rehearsal.described_devices(topology.parse("v5p:2x2x1"))
    made = cfg.mesh.make(devices)
    with jax.set_mesh(made):
        program = Training(cfg=cfg, mesh=made, spec=model_spec(cfg.model, made))
        arguments = rehearsal.train_arguments(program)
        text = program.train_step().lower(*arguments).compile().as_text()
    exchange = r"ragged-all-to-all-start\(.*?ragged-all-to-all-done\("
    covered = "\n".join(re.findall(exchange, text, re.S)).splitlines()
    products = [line for line in covered if re.search("/shared/.*dot_general", line)]
    assert any("transpose(" not in line for line in products)
    assert any("transpose(" in line for line in products)
    assert " ragged-all-to-all(" not in text
