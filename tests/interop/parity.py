"""A fixture as a moex model, without a run directory."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moex.interop.families import find_family, read_model
from moex.interop.folder import Folder
from moex.interop.hf import load_model
from moex.interop.names import pieces
from moex.model import spec as states
from moex.nn.context import Context
from tests.helpers import XLA, mesh_of

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NAMES = (
    *("mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"),
    *("llama", "qwen3"),
)


def expected(name) -> dict:
    with np.load(FIXTURES / name / "expected.npz") as file:
        return {key: file[key] for key in file.files}


def config_of(name) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


def context(want: dict, collect=False) -> Context:
    """Of the tokens of `expected`."""
    mask = want["mask"]
    position = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    return Context(
        segment_BL=jnp.asarray(mask, jnp.int32),
        position_BL=jnp.asarray(position, jnp.int32),
        token_BL=jnp.asarray(want["tokens"]),
        mode="eval",
        collect=collect,
        compute=XLA,
    )


def load(name, mesh: Mesh | None = None):
    """(model config, `ModelSpec`, {"params", "state"}, pieces) of a fixture or path."""
    config = config_of(name)
    model = read_model("config.json", config)
    spec = states.model_spec(model)
    mesh = mesh or mesh_of()
    wanted = list(pieces(model, find_family("config.json", config).names))
    folder = Folder.open(FIXTURES / name)
    return model, spec, load_model(spec, mesh, wanted, folder), wanted
