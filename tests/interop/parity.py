"""A fixture as a moex model, without a run directory."""

import json
import pathlib
import types

import jax
import numpy as np
from jax.sharding import Mesh

from moex.interop.families import find_family, read_model
from moex.interop.folder import Folder
from moex.interop.hf import load_model
from moex.interop.names import pieces
from moex.sharding import AXIS_NAMES
from moex.train import state as states

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


def load(name, mesh: Mesh | None = None):
    """(model config, `ModelSpec`, {"params", "state"}, pieces) of a fixture."""
    config = config_of(name)
    model = read_model("config.json", config)
    spec = states.model_spec(model)
    if mesh is None:
        mesh = Mesh(
            np.array(jax.devices()[:1]).reshape((1,) * len(AXIS_NAMES)), AXIS_NAMES
        )
    shards = states.shardings(spec, mesh)
    abstract = {
        part: jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, own
        )
        for part, tree, own in zip(
            ("params", "state"), (spec.params, spec.state), shards, strict=True
        )
    }
    job = types.SimpleNamespace(abstract_state=lambda: abstract)
    wanted = pieces(model, find_family("config.json", config).names)
    with Folder.open(FIXTURES / name) as folder:
        return model, spec, load_model(job, wanted, folder), wanted
