"""Configs as values: copies, checks, and the way to JSON and back."""

import dataclasses
import json

import ml_collections
import pytest

from moex import project
from moex.adapters.lora import LoRA
from moex.config.base import (
    MOVED,
    TYPE_KEY,
    Config,
    ConfigError,
    check,
    config_class,
    describe,
    flat,
    from_dict,
    nearest,
    to_dict,
    type_name,
    walk,
)
from moex.config.flags import bracketed, load_config
from moex.configs import quickstart
from moex.interop.families import FAMILIES, find_family
from moex.model.optim import AdamW, Muon, Optim
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests import runs
from tests.helpers import tiny_lm, tiny_moe


def run_config():
    optim = Optim(rule=AdamW(), lr=0.1, lr_factors=(("router", 0.1),))
    values = {"seed": 3, "model": tiny_lm(), "optim": optim}
    return ml_collections.ConfigDict(values, convert_dict=False)


def test_round_trip_through_json():
    cfg = run_config()
    text = json.dumps(to_dict(cfg))
    back = from_dict(json.loads(text))
    assert isinstance(back, ml_collections.ConfigDict)
    assert back.model == cfg.model
    assert back.optim == cfg.optim
    assert back.seed == 3
    assert isinstance(back.model.layers, tuple)
    assert json.dumps(to_dict(back)) == text
    check(back)


def test_a_flag_may_choose_a_kind():
    cfg = run_config()
    where = "--config.model.layers.1.pattern.0"
    load_config(
        [
            f"{where}.router=Soft(init_std=0.5)",
            "--config.optim.rule=Muon(momentum=0.9, adam_lr=1e-3)",
            f"{where}=MoE(num_experts=2, router=TopK(k=2), experts=Glu(hidden=4))",
            "--config.model.adapter=LoRA(rank=2, alpha=4, targets=('attention',))",
        ],
        cfg,
    )
    check(cfg)
    moe = cfg.model.layers[1].pattern[0]
    assert moe == MoE(num_experts=2, router=TopK(k=2), experts=Glu(hidden=4))
    assert cfg.optim.rule == Muon(momentum=0.9, adam_lr=1e-3)
    assert cfg.model.adapter == LoRA(rank=2, alpha=4, targets=("attention",))
    load_config(["--config.model.adapter=None"], cfg)
    assert cfg.model.adapter is None


def test_the_tag_names_the_class():
    assert to_dict(Dense(hidden=3)) == {TYPE_KEY: "moex.nn.mlp.Dense", "hidden": 3}


def test_flat_paths_are_those_of_overrides():
    found = flat(json.loads(json.dumps(to_dict(run_config()))))
    assert found["seed"] == 3
    assert found["optim.rule"] == "AdamW"
    assert found["optim.lr_factors"] == [["router", 0.1]]  # no configs inside: whole
    assert found["model.layers"] == "2 entries"
    assert found["model.layers[1].pattern[0].router"] == "TopK"
    assert found["model.layers[1].pattern[0].router.k"] == 2
    assert not any(TYPE_KEY in path for path in found)


@dataclasses.dataclass(kw_only=True, slots=True)
class Foreign(Config):
    size: int = 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({TYPE_KEY: "moex.nn.mlp.Dnese", "hidden": 3}, "is not a config class of moex"),
        ({TYPE_KEY: "moex.nn.none.Dense"}, "is not a config class of moex"),
        ({TYPE_KEY: "moex.nn.mlp.DenseLayer"}, "is not a config class of moex"),
        ({TYPE_KEY: "os.system", "command": "true"}, "'os.system' is not a config"),
        ({TYPE_KEY: "moexevil.Config"}, "is not a config class of moex"),
        ({TYPE_KEY: 3}, "'?3'? is not a config class of moex"),
        (to_dict(Foreign()), "Foreign' is not a config class of moex"),
        (
            {TYPE_KEY: "moex.nn.mlp.Dense", "hiden": 3},
            "Dense has no field 'hiden'. Did you mean 'hidden'",
        ),
        (
            {TYPE_KEY: "moex.nn.mlp.Dense"},
            r"^config.model\[0\]: Dense needs the field 'hidden'",
        ),
    ],
)
def test_json_that_is_refused(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # else the project folder: this file lies there
    project.use(None)
    with pytest.raises(ConfigError, match=message):
        from_dict({"model": [data]})


def test_nested_configs_are_copied():
    moe = tiny_moe()
    segment = Segment(pattern=(moe, moe))
    moe.num_experts = 99
    segment.pattern[0].router.k = 7
    assert [m.num_experts for m in segment.pattern] == [8, 8]
    assert [m.router.k for m in segment.pattern] == [7, 2]


def test_unknown_fields_stop_at_assignment():
    with pytest.raises(AttributeError):
        TopK(k=2).kk = 2
    with pytest.raises(TypeError):
        TopK(1)


def test_walk_names_every_node():
    paths = dict(walk(tiny_lm(), "config.model"))
    assert paths["config.model.layers[1].pattern[0].router.k"] == 2
    assert isinstance(paths["config.model.layers[1].pattern[0]"], MoE)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("router.k", 99, r"router.k = 99: must be at most num_experts = 8; lower k"),
        ("router.k", 2.5, r"router.k = 2.5: must be int, not float"),
        ("router.k", True, r"router.k = True: must be int, not bool"),
        ("router.scale", "1", r"router.scale = '1': must be float, not str"),
        ("router.normalize", 1, r"normalize = 1: must be str, not int"),
        ("capacity_factor", "x", r"= 'x': must be float or None, not str"),
        ("router", None, r"router = None: must be a router config such as TopK"),
        ("router", Dense(hidden=1), r"router = 'Dense': must be a router config"),
        ("num_experts", 0, r"num_experts = 0: must be at least 1"),
        ("capacity_factor", 0.0, r"capacity_factor = 0.0: must be above 0, or None"),
    ],
)
def test_check_names_field_value_and_what_is_allowed(path, value, message):
    cfg = ml_collections.ConfigDict({"model": tiny_lm()}, convert_dict=False)
    *parents, name = path.split(".")
    node = cfg.model.layers[1].pattern[0]
    for parent in parents:
        node = getattr(node, parent)
    setattr(node, name, value)
    with pytest.raises(ConfigError, match=message) as error:
        check(cfg)
    assert str(error.value).startswith("config.model.layers[1].pattern[0].")
    assert "\n" not in str(error.value)


def test_ints_are_floats_and_lists_are_tuples():
    segment = Segment(pattern=(Dense(hidden=1),))
    segment.pattern = [Dense(hidden=1)]
    check(segment)
    check(TopK(k=2, scale=2))


def test_describe():
    text = describe(Optim(rule=AdamW(), lr=0.1, lr_factors=(("a", 0.5),)), "optim")
    lines = text.splitlines()
    assert lines[0] == "optim: Optim"
    assert "  rule: AdamW" in lines
    assert "    b1 = 0.9" in lines
    assert "  lr = 0.1" in lines
    deep = describe(run_config()).splitlines()
    assert any(line.strip() == "[0]: MoE" for line in deep)


MODEL_FIELDS = [field.name for field in dataclasses.fields(LM)]
TENSORS = ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]


@pytest.mark.parametrize(
    ("name", "allowed", "meant"),
    [
        # Slips of the hand.
        ("lerning", ["learning", "decay"], "learning"),
        ("vocabb", MODEL_FIELDS, "vocab"),
        ("norm_esp", MODEL_FIELDS, "norm_eps"),
        ("Topk", ["topk", "topp"], "topk"),
        ("lrr", ["lr", "rule"], "lr"),
        ("uint61", ["uint16", "int32"], "uint16"),
        ("all-to-all", ["auto", "all_to_all", "gather"], "all_to_all"),
        ("mixtrall", FAMILIES, "mixtral"),
        (TENSORS[0].replace("gate", "gaet"), TENSORS[1:] + TENSORS[:1], TENSORS[0]),
        ("k", ["p", "k_max"], "k_max"),  # the beginning of a name
        ("norm", MODEL_FIELDS, "norm_eps"),
        # Other things, which are not what was meant.
        ("zzz", ["learning"], None),
        ("num_experts", MODEL_FIELDS, None),  # norm_eps, it was
        ("router", MODEL_FIELDS, None),
        ("hidden", MODEL_FIELDS, None),
        ("experts", MODEL_FIELDS, None),
        ("heads", MODEL_FIELDS, None),
        ("", MODEL_FIELDS, None),
        ("seq_len", ["steps", "seed", "data"], None),
        ("float16", ["float32", "bfloat16"], "bfloat16"),
        ("float8", ["float32", "bfloat16"], None),
        (TENSORS[0], TENSORS[1:], None),
        ("segments/0/blocks/1", ["segments/0/blocks/0", "segments/1/blocks/0"], None),
    ],
)
def test_the_name_that_may_have_been_meant(name, allowed, meant):
    expected = "" if meant is None else f" Did you mean {meant!r}?"
    assert nearest(name, allowed) == expected


@pytest.mark.parametrize(
    "family",
    [
        *("llama4", "qwen2", "qwen3_next", "qwen3_vl_moe", "gemma3", "phimoe"),
        *("deepseek", "deepseek_v32", "glm4_moe", "granitemoe", "ernie4_5_moe", "dbrx"),
        *("olmo", "olmo2", "flex_olmo", "mistral", "ministral", "gpt2"),
    ],
)
def test_another_family_of_models_is_not_a_slip(family):
    with pytest.raises(ConfigError, match="must be one of") as error:
        find_family("config.json", {"model_type": family})
    assert "Did you mean" not in str(error.value)


MOE_PATH = "config.model.layers[0].pattern[0]"


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("model.num_experts", f"'{MOE_PATH}.num_experts'"),
        ("num_experts", f"'{MOE_PATH}.num_experts'"),
        ("model.num_expert", f"'{MOE_PATH}.num_experts'"),
        ("model.router.k", f"'{MOE_PATH}.router'"),
        ("model.k", f"'{MOE_PATH}.router.k'"),
        ("model.layers[0].experts", f"'{MOE_PATH}.experts'"),
        (
            "model.hidden",
            f"'{MOE_PATH}.experts.hidden'",
        ),
        ("model.heads", "'config.model.attention.heads'"),
        ("lr", "'config.optim.lr'"),
        ("model.lr", "'config.optim.lr'"),
        ("optim.balance_scope", "'config.loss.balance_scope'"),
        ("model.dimm", "'dim'"),
        ("model.zzz", None),
    ],
)
def test_a_field_of_another_place_is_named_by_its_path(override, meant):
    with pytest.raises(ConfigError, match="no such field") as error:
        load_config([f"--config.{override}=1"], base=quickstart.get_config())
    text = str(error.value)
    if meant is None:
        assert "Did you mean" not in text
    else:
        assert f"no such field. Did you mean {meant}" in text


def test_fields_of_several_places_are_named_by_the_first_three():
    cfg = quickstart.get_config()
    layer = cfg.model.layers[0]
    cfg.model.layers = (layer,) * 5
    with pytest.raises(ConfigError) as error:
        load_config(["--config.model.num_experts=8"], base=cfg)
    three = [f"'config.model.layers[{i}].pattern[0].num_experts'" for i in range(3)]
    assert f" Did you mean {' or '.join(three)} or one of 2 more?" in str(error.value)


def test_names_of_types():
    assert type_name(int | None) == "int or None"
    assert type_name(tuple[str, ...]) == "tuple of str"
    assert type_name(tuple[str, float]) == "tuple of str, float"


@pytest.mark.parametrize("old, new", MOVED.items())
def test_classes_that_moved_are_found_under_their_old_names(old, new):
    """As a config.json says them that was written before the move."""
    cls = config_class(old, "config")
    assert f"{cls.__module__}.{cls.__qualname__}" == new


@pytest.mark.parametrize(
    "dotted, path",
    [
        ("model.layers.0.pattern.1.router.k", "model.layers[0].pattern[1].router.k"),
        ("data.sources.0", "data.sources[0]"),
        ("a.0.1.b", "a[0][1].b"),
        ("a[0].b.-1", "a[0].b[-1]"),
        ("optim.b2", "optim.b2"),
    ],
)
def test_a_number_between_dots_is_an_index(dotted, path):
    assert bracketed(dotted) == path


def test_an_override_may_number_a_field_with_dots():
    file = runs.ROOT / "configs" / "quickstart.py"
    cfg = load_config([f"--config={file}", "--config.model.layers.0.repeat=7"])
    assert cfg.model.layers[0].repeat == 7
