"""Hugging Face folders that are broken or hostile: refused in one line, or read right.

Folders are copies of the committed fixtures with something changed. An import that is
refused leaves nothing behind. One that is done gives the model of the fixture, with the
changed field as it is said, where a number is said.
"""

import json
import os
import pathlib
import random
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moex.config import base as configs
from moex.data.encoding import Tokenizer
from moex.model.paths import flat_paths
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from tests.interop import parity
from tests.robustness.attacks import check_refused, moex, snapshot, some

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
GONE = object()
NUMBERS = ("x", [1], {}, True, -1, 0, 0.5, float("nan"), 10**30, None, GONE)
WRONG = {
    bool: ("yes", 2, [True], {}, None, GONE),
    int: (*NUMBERS, "64"),
    float: (*NUMBERS, "1e-5"),
    str: (7, [], {}, "", "SILU", None, GONE),
    list: ("x", {}, [None], [[]], 7, [], None, GONE),
    dict: ("x", [], 7, {}, None, GONE),
    type(None): ("x", {}, [[]]),
}
PER_FAMILY = 24
NULL_MEANS = {"rope_interleave": False}  # in transformers, where it is no default


# Fields of config.json.


def fields_of(values: dict, path=()) -> list[tuple]:
    """The paths of all fields, nested ones too."""
    found = []
    for name, value in values.items():
        found.append((*path, name))
        if isinstance(value, dict):
            found += fields_of(value, (*path, name))
    return found


def set_field(folder, path, value, file="config.json"):
    data = holder = json.loads((folder / file).read_text())
    for name in path[:-1]:
        holder = holder[name]
    if value is GONE:
        holder.pop(path[-1], None)
    else:
        holder[path[-1]] = value
    (folder / file).write_text(json.dumps(data))


def field_cases() -> dict:
    found = {}
    for family in parity.NAMES:
        rng = random.Random(family)
        config = parity.config_of(family)
        drawn = []
        for path in fields_of(config):
            value = config
            for name in path:
                value = value[name]
            # What `mscale` becomes is compared with transformers in tests/interop.
            if not path[-1].startswith("mscale"):
                drawn += [(path, wrong) for wrong in WRONG[type(value)]]
        for path, wrong in rng.sample(drawn, PER_FAMILY):
            text = "gone" if wrong is GONE else repr(wrong).replace(" ", "")
            found[f"{family}-{'.'.join(path)}-{text}"] = (family, path, wrong)
    return found


# Files: a function of the folder each, which is a copy of llama.


def text(file, content):
    return lambda folder: (folder / file).write_text(content)


def cut(file, size):
    return lambda folder: os.truncate(folder / file, size)


def header(change):
    """A change of the header of the safetensors file; may return text instead."""

    def attack(folder):
        data = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + size])
        made = change(found)
        raw = made if isinstance(made, bytes) else json.dumps(made or found).encode()
        (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", len(raw)) + raw + data[8 + size :]
        )

    return attack


NORM = "model.norm.weight"


def entry(**values):
    return header(lambda found: found[NORM].update(values))


def size_field(size):
    def attack(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])

    return attack


def tensors(change):
    def attack(folder):
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file(values, folder / WEIGHTS)

    return attack


def shards(change=None, **more):
    """The weights as one shard with an index, which is changed."""

    def attack(folder):
        (folder / WEIGHTS).rename(folder / SHARD)
        names = dict.fromkeys(load_file(folder / SHARD), SHARD)
        index = {"metadata": {}, "weight_map": names} | more
        if change is not None:
            change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return attack


def instead(file, make):
    def attack(folder):
        (folder / file).unlink()
        make(folder / file)

    return attack


def out_of_the_folder(folder):
    shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
    shards_of = {name: "../outside.safetensors" for name in (NORM,)}
    (folder / INDEX).write_text(json.dumps({"weight_map": shards_of}))


def sparse(file, size):
    return instead(file, lambda path: (path.touch(), os.truncate(path, size)))


FILES = {
    "header-empty": cut(WEIGHTS, 0),
    "header-seven-bytes": cut(WEIGHTS, 7),
    "header-cut": cut(WEIGHTS, 200),
    "last-byte-cut": lambda folder: cut(WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)(
        folder
    ),
    "one-byte-more": lambda folder: (folder / WEIGHTS).open("ab").write(b"x"),
    **{f"header-size-{n}": size_field(n) for n in (0, 1, 2**31, 2**63, 2**64 - 1)},
    "header-list": header(lambda found: b"[]"),
    "header-null": header(lambda found: b"null"),
    "header-number": header(lambda found: b"7"),
    "header-deep": header(lambda found: b"[" * 100_000),
    "header-digits": header(lambda found: b'{"a":' + b"9" * 5000 + b"}"),
    "header-not-utf8": header(lambda found: b'{"\xff": 1}'),
    "entry-null": header(lambda found: found.update({NORM: None})),
    "entry-list": header(lambda found: found.update({NORM: []})),
    "entry-empty": header(lambda found: found.update({NORM: {}})),
    "dtype-unknown": entry(dtype="F999"),
    "dtype-null": entry(dtype=None),
    "dtype-list": entry(dtype=["F32"]),
    "dtype-other-size": entry(dtype="F64"),
    "shape-text": entry(shape="32"),
    "shape-negative": entry(shape=[-32]),
    "shape-nested": entry(shape=[[32]]),
    "shape-huge": entry(shape=[2**62]),
    "shape-float": entry(shape=[32.0]),
    "shape-null": entry(shape=None),
    "offsets-reversed": entry(data_offsets=[128, 0]),
    "offsets-negative": entry(data_offsets=[-128, 0]),
    "offsets-beyond": entry(data_offsets=[10**12, 10**12 + 128]),
    "offsets-one": entry(data_offsets=[0]),
    "offsets-overlap": entry(data_offsets=[0, 128]),
    "offsets-text": entry(data_offsets="0"),
    "metadata-list": header(lambda found: found.update({"__metadata__": [1]})),
    "tensor-gone": tensors(lambda values: values.pop(NORM)),
    "tensor-extra": tensors(lambda v: v.update(extra=np.zeros(3, np.float32))),
    "tensor-reshaped": tensors(lambda v: v.update({NORM: v[NORM].reshape(4, 8)})),
    "tensor-bool": tensors(lambda v: v.update({NORM: v[NORM] > 0})),
    "tensor-int": tensors(lambda v: v.update({NORM: v[NORM].astype(np.int32)})),
    "tensor-empty": tensors(lambda v: v.update({NORM: np.zeros(0, np.float32)})),
    "tensor-scalar": tensors(lambda v: v.update({NORM: np.array(1, np.float32)})),
    "index-good": shards(),
    "index-list": shards(weight_map=[]),
    "index-null": shards(weight_map=None),
    "index-empty": shards(weight_map={}),
    "index-numbers": shards(lambda names: names.update({NORM: 7})),
    "index-parent": shards(lambda names: names.update({NORM: f"../{SHARD}"})),
    "index-absolute": shards(lambda names: names.update({NORM: f"/{SHARD}"})),
    "index-null-byte": shards(lambda names: names.update({NORM: "a\0.safetensors"})),
    "index-long": shards(lambda names: names.update({NORM: "a" * 5000})),
    "index-long-safe": shards(
        lambda names: names.update({NORM: "a" * 5000 + ".safetensors"})
    ),
    "index-newline": shards(lambda names: names.update({NORM: "a\nb.safetensors"})),
    "index-missing-shard": shards(lambda names: names.update({NORM: "no.safetensors"})),
    "index-extra-tensor": shards(lambda names: names.update(extra=SHARD)),
    "index-lost-tensor": shards(lambda names: names.pop(NORM)),
    "index-and-single": text(INDEX, '{"weight_map": {"a": "model.safetensors"}}'),
    "index-out-of-the-folder": out_of_the_folder,
    "weights-a-folder": instead(WEIGHTS, lambda path: path.mkdir()),
    "weights-nowhere": instead(WEIGHTS, lambda path: path.symlink_to("nowhere")),
    "weights-a-loop": instead(WEIGHTS, lambda path: path.symlink_to(WEIGHTS)),
    "weights-a-pickle": lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
    "weights-a-link": lambda f: (
        shutil.move(f / WEIGHTS, f.parent / "blob"),
        (f / WEIGHTS).symlink_to(f.parent / "blob"),
    ),
    "config-a-folder": instead("config.json", lambda path: path.mkdir()),
    "config-a-loop": instead("config.json", lambda p: p.symlink_to("config.json")),
    "config-2-gb": sparse("config.json", 2 << 30),
    "tokenizer-2-gb": sparse("tokenizer.json", 2 << 30),
    "tokenizer-a-folder": instead("tokenizer.json", lambda path: path.mkdir()),
    "tokenizer-gone": lambda folder: (folder / "tokenizer.json").unlink(),
}
JUNK = {
    **{"nothing": "", "list": "[]", "null": "null", "word": "x", "empty": "{}"},
    **{"deep": "[" * 100_000, "digits": '{"a":' + "9" * 5000 + "}"},
    **{"twice": '{"a": 1, "a": 2}', "surrogate": '{"model_type": "\\ud800"}'},
}
OTHERS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
FILES |= {
    f"{file.split('.')[0]}-{name}": text(file, content)
    for file in ("config.json", *OTHERS)
    for name, content in JUNK.items()
}


def setting(file, *path, value):
    return lambda folder: set_field(folder, path, value, file)


def tokenizer(*path, value):
    return setting("tokenizer.json", *path, value=value)


DIGITS = {"type": "Split", "behavior": "Isolated", "invert": False}
for _name, _value in {
    **{"null": None, "list": [], "huge": 4_000_000_000, "negative": -1, "text": "0"},
    **{"float": 0.5, "double": 1, "one-more": 272, "far": 2**31 - 1},
}.items():
    FILES[f"token-id-{_name}"] = tokenizer("model", "vocab", "!", value=_value)
for _name, _value in {
    **{"null": None, "text": "x", "empty": {}, "word-level": {"type": "WordLevel"}},
    "no-unknown": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
    "unigram": {"type": "Unigram", "vocab": [], "unk_id": 7},
}.items():
    FILES[f"token-model-{_name}"] = tokenizer("model", value=_value)
for _name, _value in {
    "broken": DIGITS | {"pattern": {"Regex": "("}},
    "text": "x",
}.items():
    FILES[f"token-split-{_name}"] = tokenizer("pre_tokenizer", value=_value)
for _name, _value in {
    **{"null": None, "text": "x", "numbers": [7], "empty-entry": [{}]},
    **{"no-id": [{"content": "<|doc|>"}], "no-content": [{"id": 0}]},
}.items():
    FILES[f"token-added-{_name}"] = tokenizer("added_tokens", value=_value)
for _name, _value in {
    **{"null": None, "number": 7, "list": ["<|doc|>"], "unknown": "<|nothing|>"},
    **{"no-content": {}, "content-number": {"content": 7}, "empty": "", "gone": GONE},
}.items():
    SETTINGS = "tokenizer_config.json"
    FILES[f"eos-token-{_name}"] = setting(SETTINGS, "eos_token", value=_value)
    FILES[f"bos-token-{_name}"] = setting(SETTINGS, "bos_token", value=_value)
for _name, _value in {
    **{"text": "x", "list": [1], "empty": {}, "unknown": {"quant_method": "magic"}},
    "fp8-without-tensors": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fp8-zero": {"quant_method": "fp8", "weight_block_size": [0, 0]},
    "fp8-text": {"quant_method": "fp8", "weight_block_size": "x"},
    "mxfp4-without-tensors": {"quant_method": "mxfp4"},
}.items():
    FILES[f"quantised-{_name}"] = setting(
        "config.json", "quantization_config", value=_value
    )
del _name, _value
FIELDS = field_cases()


def do_import(folder, *more):
    """The outcome of `moex import-hf` into `run` beside the folder."""
    out = folder.parent / "run"
    return moex("import-hf", folder, f"--out={out}", "--config.seq_len=32", *more)


def copied(family, parent) -> pathlib.Path:
    folder = parent / "folder"
    ignore = shutil.ignore_patterns("expected.npz")
    return shutil.copytree(parity.FIXTURES / family, folder, ignore=ignore)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """`truth(family)`: the run of a fixture as it is."""
    made = {}

    def truth(family):
        if family not in made:
            parent = tmp_path_factory.mktemp(family)
            outcome = do_import(copied(family, parent))
            assert outcome.code == 0, outcome
            made[family] = parent / "run"
        return made[family]

    return truth


def check(outcome, folder, truth, family, *names, value=GONE):
    """Check that an import was refused and left nothing, or is right."""
    out = folder.parent / "run"
    if outcome.code != 0:
        check_refused(outcome, *names)
        beside = {p.name for p in folder.parent.iterdir()}
        assert beside <= {"folder", "blob", "outside.safetensors"}, beside
        return
    right = truth(family)
    mine, theirs = (
        configs.flat(configs.to_dict(RunDir(run).config())) for run in (out, right)
    )
    differ = {
        key: mine.get(key)
        for key in mine.keys() | theirs.keys()
        if mine.get(key) != theirs.get(key) and not key.startswith("data.tokenizer")
    }
    said = NULL_MEANS.get(names[0]) if value is None and names else value
    assert all(same_number(v, said) for v in differ.values()), (
        f"other than {said!r} was read: {differ}"
    )
    a, b = (Tokenizer.load(r / "tokenizer") for r in (out, right))
    assert a.fingerprint == b.fingerprint
    a, b = (load_run(r) for r in (out, right))
    for name, array in flat(b.params).items():
        np.testing.assert_array_equal(flat(a.params)[name], array, err_msg=name)


def same_number(value, said) -> bool:
    numbers = (int, float, bool)
    return type(said) in numbers and type(value) in numbers and value == float(said)


def flat(tree) -> dict:
    return {name: np.asarray(leaf) for name, leaf in flat_paths(tree).items()}


def test_there_are_many_cases():
    assert len(FILES) >= 80 and len(FIELDS) >= 80


@pytest.mark.parametrize("case", some(FIELDS, 2))
def test_a_field_of_the_wrong_kind_is_refused_or_unused(case, tmp_path, truth):
    family, path, value = case
    folder = copied(family, tmp_path)
    set_field(folder, path, value)
    before = snapshot(folder)
    outcome = do_import(folder)
    # A NaN is no JSON. Qwen3 has two names for its number of experts.
    others = ("tensor", "config.json: is not JSON", path[-1].replace("local_", ""))
    names = (path[-1], *others)
    check(outcome, folder, truth, family, *names, value=value)
    assert snapshot(folder) == before


@pytest.mark.thorough
@pytest.mark.parametrize("attack", some(FILES, 6))
def test_a_broken_folder_is_refused_or_read_right(attack, tmp_path, truth):
    folder = copied("llama", tmp_path)
    attack(folder)
    before = snapshot(folder)
    outcome = do_import(folder)
    check(outcome, folder, truth, "llama")
    assert snapshot(folder) == before
