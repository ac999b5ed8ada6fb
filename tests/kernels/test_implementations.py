"""Which implementation is chosen, what is refused, and what is said of it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import IMPLEMENTATIONS, grouped_matmul
from kernels_pallas.device import platform
from kernels_pallas.implementations import (
    DEFAULTS,
    PLATFORMS,
    ImplementationFallback,
    Request,
    choose,
    why_not,
)
from kernels_pallas.native import library

REQUEST = Request("grouped_matmul", "bfloat16", 128, 256, 8)


@pytest.fixture
def fussy(monkeypatch):
    """A table with "fussy", which runs on this platform and does bfloat16 alone."""
    entry = dataclasses.replace(
        IMPLEMENTATIONS["xla"],
        unsupported=lambda request: (
            None if request.dtype == "bfloat16" else "it has no float32"
        ),
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "fussy", entry)


def test_every_platform_has_a_default_that_runs_there():
    for where in PLATFORMS:
        for dtype in ("bfloat16", "float32"):
            request = REQUEST._replace(dtype=dtype)
            assert any(why_not(n, request, where) is None for n in DEFAULTS[where])
    assert all(entry.purpose for entry in IMPLEMENTATIONS.values())


@pytest.mark.skipif(platform() != "cpu", reason="what a CPU does")
def test_the_default_of_a_cpu_goes_by_dtype_and_compiler(monkeypatch):
    assert choose(None, REQUEST) is IMPLEMENTATIONS["cpu"]
    request = REQUEST._replace(dtype="float32")
    monkeypatch.setattr(library, "why_not", lambda: None)
    assert choose(None, request) is IMPLEMENTATIONS["native"]
    assert choose(None, request._replace(weights="int8")) is IMPLEMENTATIONS["cpu"]
    monkeypatch.setattr(library, "why_not", lambda: "it needs a C compiler")
    with pytest.warns(ImplementationFallback, match="needs a C compiler. Using 'cpu'"):
        assert choose(None, request) is IMPLEMENTATIONS["cpu"]


def test_the_first_that_can_is_taken_without_a_word(fussy):
    assert choose("fussy,xla", REQUEST) is IMPLEMENTATIONS["fussy"]


def test_a_fallback_that_was_allowed_is_told(fussy):
    request = REQUEST._replace(dtype="float32")
    message = "'fussy' cannot do grouped_matmul: it has no float32. Using 'xla'"
    with pytest.warns(ImplementationFallback, match=message):
        assert choose("fussy, xla", request) is IMPLEMENTATIONS["xla"]


def test_without_leave_nothing_else_is_used(fussy):
    message = "it has no float32. These can: .*'xla'.* commas between them"
    with pytest.raises(ValueError, match=message):
        choose("fussy", REQUEST._replace(dtype="float32"))


def test_another_platform_is_refused_by_name():
    elsewhere = [n for n, e in IMPLEMENTATIONS.items() if platform() not in e.platforms]
    for name in elsewhere:
        with pytest.raises(ValueError, match=f"{name!r} cannot .* not on {platform()}"):
            choose(name, REQUEST)


@pytest.mark.parametrize("name", ["cpuu", "xla,cpuu", ""])
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError, match="'reference', 'xla', 'cpu'.*Did you mean"):
        grouped_matmul(
            jnp.ones((8, 5)),
            jnp.ones((3, 5, 7)),
            jnp.ones(3, jnp.int32),
            implementation=name,
        )


def test_the_platform_is_that_of_the_mesh():
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "gpu"
    assert platform() == jax.default_backend()
