"""The mesh, the rules, and where arrays land."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moex.config.base import ConfigError, check
from moex.sharding import (
    AXIS_NAMES,
    BATCH_AXES,
    MeshConfig,
    batch_shards,
    check_divides,
    constrain,
    num_slices,
    param_sharding,
    partition_spec,
    process_rows,
    shard_batch,
)
from tests.helpers import mesh_of


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ({}, 8, (8, 1, 1, 1, 1)),
        ({"fsdp": 4}, 8, (2, 4, 1, 1, 1)),
        ({"data": 1, "tensor": -1, "expert": 2}, 8, (1, 1, 2, 1, 4)),
        ({"data": 2, "fsdp": 2, "seq": 1, "tensor": 2}, 8, (2, 2, 1, 1, 2)),
        ({"seq": 2}, 8, (4, 1, 1, 2, 1)),
        ({}, 1, (1, 1, 1, 1, 1)),
    ],
)
def test_sizes(sizes, devices, expected):
    assert MeshConfig(**sizes).sizes(devices) == expected


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [({"fsdp": 3}, 8), ({"data": 2}, 8), ({"data": 16}, 8), ({"tensor": 16}, 8)],
)
def test_sizes_that_do_not_multiply_to_the_devices(sizes, devices):
    message = r"config.mesh: the axes \(data=.*\) must multiply .* which is 8"
    with pytest.raises(ConfigError, match=message):
        MeshConfig(**sizes).sizes(devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "config.mesh.data = 0: must be >= 1, or -1"),
        ({"fsdp": -2}, "config.mesh.fsdp = -2"),
        ({"fsdp": -1}, r"\['data', 'fsdp'\]: must be at most one axis of size -1"),
        (
            {"exchange": "all-to-all"},
            "exchange = 'all-to-all'.*Did you mean 'all_to_all'",
        ),
        (
            {"exchange_buffer": 0.5},
            "config.mesh.exchange_buffer = 0.5: must be at least 1",
        ),
    ],
)
def test_refusals(sizes, message):
    with pytest.raises(ConfigError, match=message):
        check(MeshConfig(**sizes), "config.mesh")


def test_mesh_axes_are_auto_and_named():
    mesh = MeshConfig(fsdp=4).make()
    assert dict(mesh.shape) == {
        **{"data": 2, "fsdp": 4},
        **{"expert": 1, "seq": 1, "tensor": 1},
    }
    assert {t.name for t in mesh.axis_types} == {"Auto"}
    assert mesh_of(1).devices.size == 1


def test_rules():
    spec = partition_spec(("expert", "embed", None, "mlp"))
    assert spec == PartitionSpec("expert", "fsdp", None, "tensor")
    assert partition_spec(("batch", None)) == PartitionSpec(BATCH_AXES, None)
    assert partition_spec(("head_dim",)) == PartitionSpec(None)


def test_two_logical_axes_on_one_mesh_axis_are_an_error():
    with pytest.raises(ValueError, match="'heads' and 'mlp'.*both map to.*'tensor'"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'batch' and 'embed'.*'fsdp'"):
        partition_spec(("batch", "embed"))


def test_stacked_layers_lead():
    mesh = mesh_of(8, fsdp=2, expert=2, tensor=2)
    sharding = param_sharding((5, 4, 6, 8), ("expert", "embed", "mlp"), mesh)
    assert sharding.spec == PartitionSpec(None, "expert", "fsdp", "tensor")


def test_an_axis_that_does_not_divide_is_named_with_the_parameter():
    sizes = {"data": 1, "fsdp": 2, "expert": 8, "seq": 1, "tensor": 1}
    leaf = ("segments/0/w_in", (5, 12, 6, 8), ("expert", "embed", "mlp"))
    message = (
        r"config.mesh.expert = 8: must divide the 'expert' dim of every parameter; "
        r"that of segments/0/w_in is 12 \(num_experts, or stored_experts; its shape is "
        r"\(12, 6, 8\)"
    )
    with pytest.raises(ConfigError, match=message):
        check_divides([leaf], sizes)
    check_divides([leaf], sizes | {"expert": 4})


class Chip:
    """A described TPU chip of one of two 2x2 slices."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5 lite", 0

    def __init__(self, number):
        self.id, self.slice_index = number, number // 4
        self.process_index = self.slice_index
        self.coords = (number % 2, number // 2 % 2, 0)

    def __repr__(self):
        return f"chip {self.id}"


CHIPS = [Chip(i) for i in range(8)]


def test_slices_are_counted():
    assert num_slices(CHIPS) == 2 and num_slices(jax.devices()) == 1
    with pytest.raises(ConfigError, match="data = 1: must be a multiple .* slices = 2"):
        MeshConfig(data=1, fsdp=-1).make(CHIPS)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 4},
        {"data": 2, "expert": 2, "tensor": 2},
        {"data": 4, "fsdp": 2},
        {"data": 8},
    ],
    ids=str,
)
def test_slices_are_on_the_data_axis(sizes):
    """The first half of `data` is the first slice, whatever the order of the chips."""
    for chips in (CHIPS, CHIPS[::2] + CHIPS[1::2]):
        mesh = MeshConfig(**sizes).make(chips)
        assert dict(mesh.shape) == dict.fromkeys(AXIS_NAMES, 1) | sizes
        slices = [[c.slice_index for c in copy.flat] for copy in mesh.devices]
        first, second = np.split(np.array(slices), 2)
        assert (first == 0).all() and (second == 1).all()
        assert {c.id for c in mesh.devices.flat} == set(range(8))


def test_constrain_without_a_mesh_or_on_one_device_is_nothing():
    x = jnp.ones((8, 3, 4))
    assert constrain(x, "batch", None, "embed") is x
    with jax.set_mesh(mesh_of(1)):
        assert constrain(x, "batch", None, None) is x


def test_constrain_places_the_dims_that_fit():
    mesh = mesh_of(8, data=4, tensor=2)
    with jax.set_mesh(mesh):
        lay = jax.jit(lambda x: constrain(x, "batch", None, "vocab"))
        assert lay(jnp.ones((8, 3, 4))).sharding.spec[2] == "tensor"
        y = lay(jnp.ones((8, 3, 5)))
    assert y.addressable_shards[0].data.shape == (2, 3, 5)


def test_a_batch_is_split_over_length_too():
    mesh = mesh_of(8, data=2, fsdp=2, seq=2)
    batch = {"tokens": np.arange(48).reshape(4, 12), "domain": np.arange(4)}
    placed = shard_batch(batch, mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(1, 6)}
    assert {s.data.shape for s in placed["domain"].addressable_shards} == {(1,)}
    assert process_rows(mesh, 4) == [0, 1, 2, 3]


def test_a_batch_is_split_over_three_axes():
    mesh = mesh_of(8, data=2, expert=2, tensor=2)
    assert batch_shards(mesh) == 4
    tokens = np.arange(24).reshape(8, 3)
    placed = shard_batch({"tokens": tokens}, mesh)["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
    assert len({str(s.index) for s in placed.addressable_shards}) == 4
