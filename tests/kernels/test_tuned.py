"""The table of measured tiles: what an entry serves, and what the tuner writes."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import tune
from kernels_pallas import tuned
from kernels_pallas.implementations import PALLAS

ENTRY = {
    "operation": "product",
    "M": 4096,
    "K": 256,
    "N": 512,
    "G": 8,
    "dtype": "bfloat16",
    "us": 1.0,
}


@pytest.fixture
def measured(monkeypatch):
    """A table with two entries of one kind of device."""
    small, large = {"rows": 64}, {"rows": 128}
    entries = [
        {**ENTRY, "tiling": large},
        {**ENTRY, "M": 2048, "tiling": small},
    ]
    monkeypatch.setattr(tuned, "table", lambda: {"A": {"triton": entries}})


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({}, 128),
        ({"M": 8192}, 128),  # 1024 rows per group, twice the measured
        ({"M": 8193}, None),
        ({"M": 2500}, 64),  # nearer to 2048
        ({"M": 16384, "G": 32}, 128),  # as many rows per group
        ({"K": 128}, None),
        ({"dtype": "float32"}, None),
        ({"operation": "weight"}, None),
        ({"device": "B"}, None),
        ({"backend": "tpu"}, None),
    ],
)
def test_an_entry_serves_its_matrices_and_near_group_sizes(measured, change, rows):
    asked = {k: ENTRY[k] for k in ("operation", "M", "K", "N", "G", "dtype")}
    found = tuned.lookup(**{"device": "A", "backend": "triton", **asked, **change})
    assert (None if found is None else found["rows"]) == rows


def test_the_table_is_of_backends_and_fields_that_there_are():
    for backends in json.loads(tuned.PATH.read_text()).values():
        for name, entries in backends.items():
            for entry in entries:
                sizes = (entry[k] for k in ("operation", "M", "K", "N", "G"))
                default = PALLAS[name].matmul.default_tiling(
                    *sizes, jnp.dtype(entry["dtype"])
                )
                assert set(entry["tiling"]) == set(tune.fields(default))


def test_a_new_measurement_takes_the_place_of_the_old_one():
    table = {}
    for us in (2.0, 1.0):
        tune.replace(table, "A", "triton", {**ENTRY, "us": us})
    tune.replace(table, "A", "triton", {**ENTRY, "N": 64})
    assert [e["us"] for e in table["A"]["triton"]] == [1.0, 1.0]
    assert [e["N"] for e in table["A"]["triton"]] == [512, 64]


def test_every_default_is_a_candidate():
    for backend in PALLAS.values():
        for operation in tune.OPERATIONS:
            sizes = (operation, 8192, 512, 1024, 8, jnp.dtype("bfloat16"))
            found = backend.matmul.candidates(*sizes)
            assert found[0] == backend.matmul.default_tiling(*sizes)
            assert len(found) > 1 and len(found) == len(set(found))
