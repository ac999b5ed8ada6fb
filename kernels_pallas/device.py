"""The device that a program is traced for."""

import math

import jax


def platform() -> str:
    """The platform, "cpu", "gpu" or "tpu", of the mesh in use, else of this process.

    A mesh of devices that are only described (ahead-of-time compilation) counts too.
    JAX's trace caches know of the mesh, so a cached trace is never one for another
    platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def on_a_mesh() -> bool:
    """Whether a mesh of several devices is in use."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values()) > 1


def device_kind() -> str:
    """The kind of device, such as "NVIDIA H100 80GB HBM3" or "TPU v5e"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind
