"""Folders made of fixtures, runs made of folders."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np

from moex.data.sources import Text
from moex.interop.folder import Folder, stored_tensors
from moex.interop.hf import import_hf
from moex.interop.writing import Tensor, write
from moex.runs.directory import given_config
from moex.train import training
from tests import runs
from tests.interop import parity

SAY = {"say": lambda line: None}


def import_fixture(name, out, folder=None):
    with runs.one_device():
        folder = folder or parity.FIXTURES / name
        return import_hf(folder, out, ["--config.seq_len=32"], **SAY)


def tensors(folder) -> dict:
    opened = Folder.open(folder)
    return {n: opened[n].read() for n in opened.names}


def tensors_of_file(folder, name="adapter_model.safetensors") -> dict:
    """The tensors of the only file of an adapter's folder."""
    return {n: t.read() for n, t in stored_tensors(folder / name).items()}


def same_tensors(a, b) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert value.tobytes() == b[name].tobytes(), name


def train_on(tmp_path, run, *fields) -> None:
    """`moex train` in the run's own folder, on a small text."""
    fields = ("eval.every=0", "batch_size=2", "log.sample_tokens=0", *fields)
    args = [f"--config={run}", *(f"--config.{f}" for f in fields)]
    cfg = given_config(args)
    text = runs.write_corpus(tmp_path / "corpus.txt")
    cfg.data = dataclasses.replace(cfg.data, sources=(Text(paths=(str(text),)),))
    with runs.one_device():
        training.train(cfg, run, **SAY)


def changed(tmp_path, name, change=None, config=None, **options) -> pathlib.Path:
    """A copy of a fixture with other tensors, other fields."""
    source = parity.FIXTURES / name
    values = tensors(source)
    if change is not None:
        change(values)
    fields = json.loads((source / "config.json").read_text()) | (config or {})
    files = {"config.json": json.dumps(fields)}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        files[file] = source / file
    made = [
        Tensor(n, v.shape, v.dtype, lambda v=v: v) for n, v in sorted(values.items())
    ]
    write(tmp_path / "changed", made, files=files, **options)
    return tmp_path / "changed"


def mxfp4_folder(tmp_path) -> pathlib.Path:
    """GPT-OSS with experts wide enough to be packed, as it is published."""

    def quantise(values):
        rng = np.random.default_rng(0)
        for name in [n for n in values if ".mlp.experts." in n]:
            own = values.pop(name)
            E, D = len(own), parity.config_of("gpt_oss")["hidden_size"]
            if name.endswith("_bias"):
                wide = rng.normal(size=(E, 64 if "gate_up" in name else D))
                values[name] = wide.astype(ml_dtypes.bfloat16)
                continue
            # [E, out, groups of 32 inputs]: of D and F there is one group each.
            shape = (E, 64 if "gate_up" in name else D, 1)
            values[f"{name}_blocks"] = rng.integers(0, 256, (*shape, 16), np.uint8)
            values[f"{name}_scales"] = rng.integers(120, 127, shape, np.uint8)

    settings = {"quantization_config": {"quant_method": "mxfp4"}}
    return changed(tmp_path, "gpt_oss", quantise, {"intermediate_size": 32} | settings)
