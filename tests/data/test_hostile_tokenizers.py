"""Tokenizer files that someone changed: each works, or is refused in one line."""

import json
import random

import pytest

from moex.config.base import ConfigError
from moex.data.tokenizer import SavedTokenizer, TokenizerFile
from tests.data import zoo

VALUES = (None, 0, -1, 1.5, 2**31, 2**40, True, "", [], {}, "x", [1], {"type": "x"})


@pytest.fixture(scope="module")
def specs():
    """JSON of every kind of tokenizer."""
    makes = list((zoo.LOSSLESS | zoo.OTHERS).values())[1:]
    return [json.loads(make().to_str()) for make in makes]


def places(part, at=()):
    """Where something stands in JSON, of large parts only the first."""
    yield at
    if isinstance(part, dict):
        for key in list(part)[:40]:
            yield from places(part[key], (*at, key))
    elif isinstance(part, list):
        for i in range(min(len(part), 20)):
            yield from places(part[i], (*at, i))


def change(spec, rng):
    """A copy in which one thing is missing or of another kind."""
    spec = json.loads(json.dumps(spec))
    *way, last = rng.choice([at for at in places(spec) if at])
    part = spec
    for key in way:
        part = part[key]
    if rng.random() < 0.4:
        del part[last]
    else:
        part[last] = rng.choice(VALUES)
    return spec


def use(file, folder):
    """What a run does with a tokenizer; it must be able to read what it saved."""
    made = TokenizerFile(path=str(file), doc_token="[DOC]").make("t", None, folder)
    pairs = made.encode_with_bytes(["the cat \u4e2d [DOC]", "", "x"])
    for ids, sizes in pairs:
        assert len(ids) == len(sizes) and (sizes >= 0).all()
    made.continued("the", made.encode("the cat é"))
    assert len(made.pieces()) == made.vocab_size
    made.save(folder / "saved")
    back = SavedTokenizer(path=str(folder / "saved")).make("t", None, folder)
    assert back.fingerprint == made.fingerprint


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 9))]
)
def test_a_changed_file_works_or_is_refused_in_one_line(specs, tmp_path, seed):
    rng = random.Random(seed)
    used = refused = 0
    for _ in range(120):
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(change(rng.choice(specs), rng)), encoding="utf-8")
        try:
            use(file, tmp_path)
            used += 1
        except ConfigError as e:
            refused += 1
            assert "\n" not in str(e) and "tokenizer.json" in str(e)
    assert used > 5 and refused > 50
