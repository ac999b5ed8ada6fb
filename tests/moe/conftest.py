"""Routing is where a silent float64 or bfloat16 hurts: no implicit promotion here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield
