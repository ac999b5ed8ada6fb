"""Jobs that no device can hold are refused before anything is compiled."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moex.config.base import ConfigError
from moex.model.accounting import device_bytes
from moex.runs import room
from moex.runs.room import check_room
from tests.helpers import mesh_of

GIB = 2**30


def cfg(**changes):
    fields = {"batch_size": 8, "grad_accum": 2, "seq_len": 1024}
    model = ml_collections.ConfigDict({"num_outputs": 65536})
    return ml_collections.ConfigDict(fields | {"model": model} | changes)


def state(mesh, gib, axes=()):
    shape = (gib, GIB // 4)
    placed = NamedSharding(mesh, PartitionSpec(*axes))
    return {"params": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)}


@pytest.fixture
def ten_gib(monkeypatch):
    monkeypatch.setattr(room, "device_bytes", lambda mesh: 10 * GIB)


# The logits of 4 sequences of 1024 tokens take 1 GiB.
@pytest.mark.parametrize("gib", [1, 9])
def test_a_job_that_fits_is_left_alone(ten_gib, gib):
    mesh = mesh_of()
    check_room(cfg(), mesh, state(mesh, gib))


def test_parameters_that_no_device_can_hold(ten_gib):
    mesh = mesh_of()
    with pytest.raises(ConfigError, match=r"take 12.0 GiB of each device, which has 1"):
        check_room(cfg(), mesh, state(mesh, 12))


def test_sharding_makes_room(ten_gib):
    mesh = mesh_of(4, data=1, fsdp=4)
    check_room(cfg(), mesh, state(mesh, 12, ("fsdp",)))
    with pytest.raises(ConfigError, match="take 12.0 GiB"):
        check_room(cfg(), mesh, state(mesh, 12))


def test_logits_that_no_device_can_hold(ten_gib):
    mesh = mesh_of()
    large = cfg(batch_size=40)
    with pytest.raises(ConfigError, match=r"batch_size = 40: .* 5.0 GiB .* 6.0 of"):
        check_room(large, mesh, state(mesh, 6))
    check_room(cfg(batch_size=40, grad_accum=8), mesh, state(mesh, 6))
    split = mesh_of(2, data=2)
    check_room(large, split, state(split, 6))


def test_the_devices_of_a_cpu_share_the_memory_of_the_host():
    one, four = (
        device_bytes(mesh.local_devices) for mesh in (mesh_of(1), mesh_of(4, data=4))
    )
    assert 2**28 < four < one < math.inf
    assert one == pytest.approx(4 * four)
