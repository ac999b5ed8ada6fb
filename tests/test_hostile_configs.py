"""Configs that other hands wrote or edited: one line with the file and the field."""

import copy
import dataclasses
import json
import math

import ml_collections
import numpy as np
import pytest

from moex.config import base as configs
from moex.config.base import (
    DEEPEST,
    HUGEST,
    LARGEST,
    MOST,
    TINIEST,
    TYPE_KEY,
    Config,
    ConfigError,
    check,
    children,
    from_dict,
    short,
    to_dict,
    walk,
)
from moex.config.schedule import Schedule
from moex.data.pipeline import Data
from moex.data.tokenizer import Bytes
from moex.model.optim import Muon
from moex.moe.chain import Chain
from moex.moe.experts.zero import Zero
from moex.moe.layer import MoE
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense
from moex.nn.rope import Yarn
from moex.nn.stack import Segment
from moex.runs.directory import RunDir
from moex.runs.keys import RUN_KEYS, check_run
from tests.helpers import tiny_lm, tiny_moe

BASE: dict = {TYPE_KEY: "moex.config.base.Config"}


@pytest.fixture(scope="module")
def good():
    """A run config of many classes, as `save_config` writes it."""
    from moex.configs import base

    cfg = base.get_config()
    cfg.model = tiny_lm()
    cfg.model.attention.rope_scaling = Yarn(factor=4.0, original=64)
    cfg.loss.z = Schedule(points=((0, 0.0), (10, 1.0)))
    cfg.data.tokenizer = Bytes()
    check_run(cfg)
    return cfg


def refusal(folder, text: str | bytes) -> str:
    """The one line that `load_config` refuses a file with."""
    data = text.encode() if isinstance(text, str) else text
    (folder / "config.json").write_bytes(data)
    with pytest.raises(ConfigError) as error:
        RunDir(folder).config()
    said = str(error.value)
    assert said.startswith(f"{folder / 'config.json'}: ")
    assert "\n" not in said
    assert len(said) < 600 + len(str(folder))
    return said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "config.seed: missing; it must be int"),
        ("null", "must be a JSON object, not null"),
        ("[]", "must be a JSON object, not a list"),
        ("", "is not JSON"),
        (b"\xff{}", "byte 0 is not UTF-8"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 600 + "1" + "}" * 600, f"nested deeper than {DEEPEST} levels"),
        ('{"seed": ' + "1" * 5000 + "}", "4300 digits"),
        ('{"seed": 1e999}', "no float holds"),
        (json.dumps(BASE), "must be a mapping of run keys, not Config"),
        ('{"a.b": 1}', "dots in field names"),
        ('{"__class__": 1}', "cannot be overridden"),
        ('{"keys": 1}', "config.keys: no such run key"),
    ],
    ids=range(13),
)
def test_a_config_file_that_is_none(tmp_path, text, said):
    assert said in refusal(tmp_path, text)


# Where, what stands there, what is said.
EDITS = [
    ("model.dim", "64", "config.model.dim = '64': must be int, not str"),
    ("model.dim", 2**63, "model.dim = 9223372036854775808: must be at most"),
    ("model.dim", 10**400, "config.model.dim = 1000"),
    ("model.dim", True, "config.model.dim = True: must be int, not bool"),
    ("model.vocab", 2**31, "config.model.vocab = 2147483648: must be at most"),
    ("model.layers.1.pattern.0.num_experts", 2**21, "must be at most"),
    ("model.layers.1.repeat", 10**6, "repeat = 1000000: must be at most"),
    ("model.layers.1.pattern.0.router", BASE, "router = 'Config': must be a router"),
    ("model.layers.1.pattern.0.experts", BASE, "must be an experts config such as"),
    ("model.layers.1.pattern", BASE, "must be tuple of a feed-forward"),
    ("model.layers.1.pattern.0", BASE, "must be a feed-forward config"),
    ("model.attention", BASE, "must be an attention config"),
    ("model.attention.heads", 0, "config.model.attention.heads = 0: must be"),
    ("model.attention.rope_scaling", {}, "rope_scaling = {}: must be Linear or"),
    ("model.attention.rope_scaling.factor", 1e308, "must be 0, or between 1e-30"),
    ("model.attention.rope_scaling.original", None, "must be int, not NoneType"),
    ("model", {"dim": 1}, "config.model = {'dim': 1}: must be Model, not ConfigDict"),
    ("model.__config__", "moex.nn.lm.Lm", "config.model: 'moex.nn.lm.Lm' is not a"),
    ("model.__config__", ["a"], "config.model: ['a'] is not a config class"),
    ("model.__config__", "moex.runs.keys.Eval", "config.model: Eval has no field"),
    ("model.depth", 3, "config.model: LM has no field 'depth'"),
    ("eval", {TYPE_KEY: "moex.runs.keys.Log"}, "config.eval = Log(every=10"),
    ("eval.every", 5e-324, "config.eval.every = 5e-324: must be 0, or"),
    ("optim.rule", BASE, "config.optim.rule = 'Config': must be AdamW"),
    ("optim.lr", 1e308, "config.optim.lr = 1e+308: must be 0, or between"),
    ("optim.rule.b1", 1 - 2**-53, "must be 1, or a number that float32 can tell"),
    ("optim.lr_factors", [["router"]], "must be tuple of tuple of str, float or"),
    ("optim.lr_factors", {"router": 1}, "lr_factors = {'router': 1}: must be tuple"),
    ("loss.z.points", [[0]], "config.loss.z.points = ((0,),): must be tuple"),
    ("loss.z.points", [[0, 1e40]], "config.loss.z.points[0][1] = 1e+40: must be"),
    ("data.tokenizer", BASE, "must be a tokenizer config"),
    ("data.tokenizer", to_dict(Dense(hidden=1)), "must be a tokenizer config"),
    ("data.sources.0.weight", 5e-324, "sources[0].weight = 5e-324: must be 0, or"),
    ("data.sources.0.__config__", "moex.data.contract.Source", "is not a config"),
    ("data.sources", [], "config.data.sources = (): must be not empty"),
    ("data.threads", 10**6, "config.data.threads = 1000000: must be at most"),
    ("batch_size", 2**30, "batch_size = 1073741824: must be at most 2,147,483,647 tok"),
    ("init_from", "a\0b", "config.init_from = 'a\\x00b': must be text without"),
    ("init_from", "\ud800", "config.init_from = '\\ud800': must be text"),
    ("precision", "x" * 10**5, "config.precision = 'xxx"),
    ("steps", 1.0, "config.steps = 1.0: must be int, not float"),
    ("color", 1, "config.color: no such run key"),
]


@pytest.mark.parametrize(("path", "value", "said"), EDITS)
def test_a_config_file_that_was_edited(good, tmp_path, path, value, said):
    data = to_dict(good)
    node, *rest = data, *path.split(".")
    for name in rest[:-1]:
        node = node[int(name)] if isinstance(node, list) else node[name]
    node[int(rest[-1]) if isinstance(node, list) else rest[-1]] = value
    text = json.dumps(data)
    assert said in refusal(tmp_path, text)


@pytest.mark.parametrize("key", RUN_KEYS)
def test_a_config_file_without_one_of_its_keys(good, tmp_path, key):
    data = to_dict(good)
    del data[key]
    if key == "task":  # runs from before there were tasks are of language models
        (tmp_path / "config.json").write_text(json.dumps(data))
        assert RunDir(tmp_path).config().task == good.task
        return
    assert f"config.{key}: missing" in refusal(tmp_path, json.dumps(data))


def test_a_good_config_file_is_read_as_it_was_written(good, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(good)))
    assert to_dict(RunDir(tmp_path).config()) == to_dict(good)


HOSTILE = (
    *(0, -1, 2**31, 2**63, 10**400, 1e308, 5e-324, math.nan, math.inf, 1e30, "", "a"),
    *("\0", None, True, (), [], (None,), ((),), {}, Config(), Dense(hidden=8)),
    *((Dense(hidden=8),), ml_collections.ConfigDict({"a": 1})),
)


def test_hostile_values_in_every_field_are_accepted_or_refused_in_one_line(good):
    """Every field of every config of a run, eight values each: only `ConfigError`s."""
    cfg = copy.deepcopy(good)
    places = [
        (node, path, name, value)
        for path, node in walk(cfg, "config")
        if isinstance(node, Config)
        for name, value in children(node)
    ]
    assert len(places) > 100
    refused = 0
    for i, (node, path, name, before) in enumerate(places):
        for value in HOSTILE[i % 3 :: 3]:
            setattr(node, name, value)
            try:
                check_run(cfg)
            except ConfigError as e:
                refused += 1
                assert "\n" not in str(e), (path, name, value)
                assert len(str(e)) < 600, (path, name, value)
        setattr(node, name, before)
    check_run(cfg)
    assert refused > 0.7 * len(places) * len(HOSTILE) / 3


@dataclasses.dataclass(kw_only=True, slots=True)
class Numbers(Config):
    count: int = 1
    rate: float = 1.0
    num_experts: int = 1


@pytest.mark.parametrize(
    "numbers",
    [
        Numbers(count=LARGEST),
        Numbers(count=-LARGEST),
        Numbers(rate=HUGEST),
        Numbers(rate=-TINIEST),
        Numbers(rate=0.0),
        Numbers(rate=1 - 2**-24),
        Numbers(num_experts=2**20),  # PEER, arXiv:2407.04153, has a million
    ],
)
def test_numbers_at_the_bounds_are_allowed(numbers):
    check(numbers)
    assert np.float32(numbers.rate) == 0 or np.isfinite(1 / np.float32(numbers.rate))


def test_bounds_of_what_is_made_one_by_one_name_fields_that_exist():
    classes = (
        Attention,
        Chain,
        Data,
        LM,
        LatentAttention,
        MoE,
        Muon,
        Segment,
        Zero,
    )
    names = {f.name for cls in classes for f in dataclasses.fields(cls)}
    assert set(MOST) <= names


def test_values_are_quoted_in_one_short_line():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert short("a" * 1000) == "'" + "a" * 196 + "..."
    # Python from 3.12 on can write it.
    assert short(deep) in ("<list>", "[" * 197 + "...")
    assert short(10**5000) == "<int>"
    assert short(ml_collections.ConfigDict({"a": 1})) == "{'a': 1}"
    assert short("a\nb") == r"'a\nb'"


def test_what_is_nested_too_deep_is_refused_before_the_stack_ends():
    data: dict = {}
    for _ in range(5000):
        data = {"a": data}
    with pytest.raises(ConfigError, match="nested deeper than 50 levels"):
        from_dict(data)
    cfg = tiny_moe()
    for _ in range(100):
        cfg = [cfg]
    with pytest.raises(ConfigError, match="nested deeper than 50 levels"):
        configs.check(cfg)
