"""Plan files: what is written is read again, and every mistake is one clear line."""

import dataclasses
import json

import pytest

from moex.config.base import ConfigError
from moex.convert.plans import Keep, Merge, Plan
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.base import base_hash
from tests.helpers import tiny_lm

MERGE = Merge(
    layer=1,
    experts=4,
    groups=((0, 3), (1, 2)),
    dominant=(3, 1),
    weights=(0.1, 0.2, 0.3, 0.4),
)
KEEP = Keep(layer=1, experts=4, keep=(0, 2), scores=(0.5, -1.0, 2.5, 0.0))


def plan(*layers, **changes):
    kind = "merge" if isinstance(layers[0], Merge) else "keep"
    facts = {"run": "runs/a", "step": 7, "base": "0", "how": {"align": "dominant"}}
    return Plan(kind=kind, layers=layers, **facts | changes)


@pytest.mark.parametrize("layer", [MERGE, KEEP], ids=["merge", "keep"])
def test_a_plan_is_read_as_it_was_written_with_a_line_for_each_layer(layer, tmp_path):
    written = plan(layer, dataclasses.replace(layer, layer=3))
    written.save(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json", written.kind) == written
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert [
        json.loads(line.rstrip(","))["layer"] for line in lines if "[0" in line
    ] == [
        1,
        3,
    ]


def test_what_people_may_leave_out_has_a_default(tmp_path):
    for layer, name, value in ((MERGE, "weights", (1.0,) * 4), (KEEP, "scores", None)):
        plan(layer).save(tmp_path / "plan.json")
        data = json.loads((tmp_path / "plan.json").read_text())
        del data["layers"][0][name]
        (tmp_path / "plan.json").write_text(json.dumps(data))
        read = Plan.read(tmp_path / "plan.json", data["kind"])
        assert read.layers == (dataclasses.replace(layer, **{name: value}),)


BAD = {
    "layer 1: groups: expert 3 stands there twice": {"groups": [[0, 3], [1, 3]]},
    "layer 1: groups: expert 2 is in none": {"groups": [[0, 3], [1]]},
    "layer 1: groups = 4: must be from 0 to 3": {"groups": [[0, 3], [1, 2, 4]]},
    r"layer 1: groups\[2\] = \[\]: must be not empty": {"groups": [[0, 3], [1, 2], []]},
    "layer 1: groups = 'all': must be list of list of int": {"groups": "all"},
    r"layer 1: dominant = \(3,\): must be 2 experts": {"dominant": [3]},
    r"layer 1: dominant = 2: must be in its group, \[0, 3\]": {"dominant": [2, 1]},
    "layer 1: weights = '3 numbers': must be 4 numbers": {"weights": [1, 1, 1]},
    "layer 1: weights = -1: must be finite and at least 0": {"weights": [1, 1, 1, -1]},
    "layer 1: experts = 0: must be from 1 to": {"experts": 0},
    "has no field 'layer'": {"layer": None},
    "layer 1: no such field: 'dominat'. Did you mean 'dominant'": {"dominat": [0]},
}


@pytest.mark.parametrize("told", BAD)
def test_a_mistake_in_a_plan_of_groups_is_named(told, tmp_path):
    plan(MERGE).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    for name, value in BAD[told].items():
        data["layers"][0][name] = value
        if value is None:
            del data["layers"][0][name]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=told) as error:
        Plan.read(tmp_path / "plan.json", "merge")
    assert str(error.value).startswith(str(tmp_path / "plan.json"))


def test_other_mistakes_in_a_plan_are_named(tmp_path):
    file = tmp_path / "plan.json"
    for change, told in (
        (lambda d: d["layers"][0].update(keep=[]), r"keep = \[\]: must be not empty"),
        (lambda d: d["layers"][0].update(keep=[2, 2]), "expert 2 stands there twice"),
        (lambda d: d["layers"][0].update(scores=[0.0]), "scores = '1 numbers'"),
        (lambda d: d["layers"].append(d["layers"][0]), "layer 1 stands there twice"),
        (lambda d: d.update(layers=[]), r"layers = \[\]: must be not empty"),
        (lambda d: d.update(kind="kep"), "kind = 'kep'.* Did you mean 'keep'"),
        (lambda d: d.update(kind="merge"), "kind = 'merge': must be 'keep' for this"),
        (lambda d: d.update(version=2), "version = 2: must be 1"),
        (lambda d: d.pop("base"), "has no field 'base'"),
        (lambda d: d.update(hw={}), "no such field: 'hw'. Did you mean 'how'"),
    ):
        plan(KEEP).save(file)
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))
        with pytest.raises(ConfigError, match=told):
            Plan.read(file, "keep")


def test_a_plan_changes_nothing_if_all_experts_stay_alone():
    assert MERGE.changes() and KEEP.changes()
    alone = tuple((e,) for e in range(MERGE.experts))
    assert not dataclasses.replace(MERGE, groups=alone).changes()
    assert not dataclasses.replace(KEEP, keep=tuple(range(KEEP.experts))).changes()


def test_a_plan_is_checked_against_the_model():
    moe = MoE(num_experts=4, router=TopK(k=2), experts=Glu(hidden=4))
    dense = Segment(pattern=(Dense(hidden=8),))
    model = tiny_lm(dense, Segment(pattern=(moe,)))
    right = plan(MERGE, base=base_hash(model))
    right.check(model)
    changed = dataclasses.replace(MERGE, layer=0)
    with pytest.raises(ConfigError, match="the plan, layer 0: is dense"):
        plan(changed, base=right.base).check(model)
    changed = dataclasses.replace(MERGE, layer=2)
    with pytest.raises(ConfigError, match="layer 2: the model has 2 layers, from 0"):
        plan(changed, base=right.base).check(model)
    moe.num_experts = 5
    with pytest.raises(ConfigError, match="layer 1: experts = 4: must be 5, as in"):
        right.check(tiny_lm(dense, Segment(pattern=(moe,))))
    other = tiny_lm(*model.layers, dim=2 * model.dim)
    with pytest.raises(ConfigError, match=r"for another model \(runs/a\)"):
        right.check(other)
