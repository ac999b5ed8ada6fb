"""Steering files: what they say is what the model computes, in one program."""

import json

import jax
import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.model import decode
from moex.model.steering import LayerSteering, Steering
from moex.moe.chain import Chain
from moex.moe.experts.zero import Zero
from moex.moe.narrow import Narrow
from moex.moe.routers.hash import Hash
from moex.moe.routers.soft import Soft
from moex.moe.routers.topk import TopK
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests.helpers import TASK, XLA, built, random_batch, tiny_lm, tiny_moe

FILE = {
    "kind": "steering",
    "how": {"score": "nPMI"},
    "layers": [
        {"layer": 1, "experts": 8, "scale": {"3": 4.0, "0": 0}, "ban": [5]},
        {"layer": 2, "force": [7, 2]},
    ],
}


def written(folder, data):
    path = folder / "steer.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_a_file_comes_back_as_it_was_written(tmp_path):
    read = Steering.read(written(tmp_path, FILE))
    one, two = read.layers
    assert (one.layer, one.scale, one.ban) == (1, {3: 4.0, 0: 0.0}, (5,))
    assert (two.layer, two.force, two.experts) == (2, (7, 2), None)
    read.save(tmp_path / "again.json")
    again = Steering.read(tmp_path / "again.json")
    assert (again.layers, again.how) == (read.layers, {"score": "nPMI"})
    text = (tmp_path / "again.json").read_text()
    assert text.count("\n") == 4  # a line for each layer, for people who edit it


def test_arrays_are_nested_as_the_modules_are():
    """Two copies of a layer; a narrow chain; zero-computation experts have ids too."""
    plain = {"shared": None}
    chain = Chain(moe=tiny_moe(4, router=TopK(k=1), **plain), iterations=2)
    last = tiny_moe(4, zero=Zero(copy=2), **plain)
    model = tiny_lm(
        Segment(pattern=(Dense(hidden=8), tiny_moe(8)), repeat=2),
        Segment(pattern=(Narrow(latent=8, inner=chain), last)),
    )
    layers = (
        LayerSteering(layer=3, scale={1: 2.0}, ban=(7,)),
        LayerSteering(layer=4, force=(2,)),
        LayerSteering(layer=5, ban=(5,)),
    )
    tree = Steering(layers=layers).arrays(model)["segments"]
    two = tree["0"]["blocks"]["1"]["ffn"]
    assert list(tree["0"]["blocks"]) == ["1"]
    assert two["scale_E"].tolist() == [[1.0] * 8, [1.0, 2.0, *[1.0] * 6]]
    assert np.argwhere(two["ban_E"]).tolist() == [[1, 7]]
    inner = tree["1"]["blocks"]["0"]["ffn"]["inner"]
    assert np.argwhere(inner["force_E"]).tolist() == [[0, 2]]
    assert np.argwhere(tree["1"]["blocks"]["1"]["ffn"]["ban_E"]).tolist() == [[0, 5]]


def test_a_plan_of_kept_experts_bans_the_others(tmp_path):
    plan = {"kind": "keep", "version": 1, "run": "a", "step": 3, "base": "abc"}
    plan["layers"] = [
        {"layer": 2, "experts": 8, "keep": [0, 5, 7], "scores": [0.0] * 8}
    ]
    (own,) = Steering.read(written(tmp_path, plan)).layers
    assert own.ban == (1, 2, 3, 4, 6) and not own.scale and not own.force


def layers(**fields):
    return {"kind": "steering", "layers": [{"layer": 1} | fields]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "is not JSON"),
        ({"layers": []}, "has no field 'kind'"),
        ({"kind": "merge", "layers": []}, "kind = 'merge': must be 'steering', or 'ke"),
        ({"kind": "steering", "layers": []}, "must be not empty"),
        (layers() | {"hw": {}}, "no such field: 'hw'. Did you mean 'how'?"),
        (layers(scal={}), "layers[0]: no such field: 'scal'. Did you mean 'scale'?"),
        (layers(scale={"3": -1}), "scale[3] = -1: must be in [0, 3.4e+38]"),
        (layers(scale={"3": 1e39}), "scale[3] = 1e+39: must be in"),
        (
            '{"kind":"steering","layers":[{"layer":1,"scale":{"3":NaN}}]}',
            "NaN is no JS",
        ),
        (layers(scale={"x": 1}), "scale = 'x': must be by the numbers of experts"),
        (layers(scale={"03": 1}), "scale = '03': must be by the numbers of experts"),
        (layers(ban=[1, 1]), "ban = [1, 1]: must be numbers of experts, each once"),
        (layers(ban=[-1]), "must be numbers of experts, each once"),
        (layers(ban=3), "ban = 3: must be list of int"),
        (layers(layer=-1), "layer = -1: must be 0 or more"),
        (
            {"kind": "steering", "layers": [{"layer": 1}] * 2},
            "layer = 1: must be named",
        ),
        (
            {"kind": "keep", "layers": [{"layer": 1, "experts": 4, "keep": [4]}]},
            "0 to 3",
        ),
        (
            {"kind": "keep", "layers": [{"layer": 1, "experts": 4, "keep": []}]},
            "0 to 3",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, data, said):
    with pytest.raises(ConfigError) as error:
        Steering.read(written(tmp_path, data))
    text = str(error.value)
    assert said in text and "steer.json" in text and "\n" not in text


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"layer": 0},
            "layer 0: has no experts in this model; layers with experts: 1,",
        ),
        ({"layer": 9}, "layer 9: has no experts in this model"),
        ({"layer": 1, "experts": 16}, "experts = 16: must be 8, those of this model"),
        ({"layer": 1, "scale": {8: 1.0}}, "scale = 8: must be an expert from 0 to 7"),
        ({"layer": 1, "force": (1, 2), "ban": (2,)}, "force = [2]: must be other exp"),
        ({"layer": 1, "force": (1, 2, 3)}, "force = [1, 2, 3]: must be at most 2 exp"),
        ({"layer": 1, "ban": tuple(range(8))}, "must be fewer than all experts"),
        ({"layer": 3, "ban": (1,)}, "ban = [1]: must be empty: Hash takes no bans"),
        ({"layer": 4, "force": (1,)}, "force = [1]: must be empty: Soft takes none"),
    ],
)
def test_a_file_for_another_model_is_one_line(own, said):
    model = tiny_lm(
        Segment(pattern=(Dense(hidden=8),)),
        Segment(pattern=(tiny_moe(8),), repeat=2),
        Segment(pattern=(tiny_moe(4, router=Hash(k=1)), tiny_moe(4, router=Soft()))),
    )
    with pytest.raises(ConfigError) as error:
        Steering(layers=(LayerSteering(**own),), where="a.json").arrays(model)
    assert str(error.value).startswith("a.json: layer") and said in str(error.value)


def test_steering_follows_the_experts_that_are_kept():
    """Ids are those of the whole model; zero-computation experts come after."""
    model = tiny_lm(Segment(pattern=(tiny_moe(6, zero=Zero(copy=2)),), repeat=2))
    keep = {0: (5, 1, 2)}

    def of(**fields):
        fields = {"layer": 0, "experts": 6, **fields}
        both = LayerSteering(**fields), LayerSteering(layer=1, ban=(4,))
        return Steering(layers=both, where="a.json").of_kept(model, keep, "task a")

    one, two = of(
        scale={1: 2.0, 4: 3.0, 5: 0.5, 6: 7.0}, force=(2, 7), ban=(0, 1)
    ).layers
    assert one.scale == {0: 2.0, 2: 0.5, 3: 7.0}
    assert (one.force, one.ban, one.experts) == ((1, 4), (0,), None)
    assert two == LayerSteering(layer=1, ban=(4,))
    for fields, said in (
        ({"force": (1, 3)}, "force = 3: must be an expert that task a keeps: [1, 2, 5"),
        ({"ban": (1, 2, 5, 6, 7)}, "ban = [1, 2, 5, 6, 7]: must be fewer than all exp"),
        ({"force": (8,)}, "force = 8: must be an expert from 0 to 7"),
    ):
        with pytest.raises(ConfigError) as error:
            of(**fields)
        assert str(error.value).startswith(f"a.json: layer 0: {said}")


# In a model.


@pytest.fixture(scope="module")
def steered():
    """(model, parameters, logits of a batch by steering, how many were compiled)."""
    model = tiny_lm()
    spec, params, state = built(model)
    batch = random_batch(4, 16)

    @jax.jit
    def run(params, steer):
        ctx = TASK.context(batch, mode="eval", compute=XLA, steer=steer)
        return spec.merge(params, state)(ctx)

    return model, spec, params, state, lambda steer: run(params, steer), run


def arrays(model, **fields):
    return Steering(layers=(LayerSteering(layer=1, **fields),)).arrays(model)


@pytest.mark.thorough
def test_a_factor_of_1_changes_no_bit_and_other_values_compile_nothing(steered):
    model, *_, run, jitted = steered
    plain, _ = run(None)
    ones, told = run(arrays(model, scale={0: 1.0}))
    np.testing.assert_array_equal(plain, ones)
    assert float(told["peak"]) > 0
    programs = jitted._cache_size()
    several = ({"scale": {1: 9.0}}, {"scale": {2: 0.0}})
    for fields in (*several, {"force": (3,)}, {"ban": (0, 1)}, {"ban": (2,)}):
        other, _ = run(arrays(model, **fields))
        assert np.abs(other - plain).max() > 1e-3
    # One program as trained, one for factors, and one where experts are chosen.
    assert jitted._cache_size() == programs + 1 == 3


@pytest.mark.thorough
def test_decoding_is_steered_as_a_whole_text_is(steered):
    """Greedy tokens, with and without, in one program for all values."""
    model, spec, params, state, *_ = steered
    prompts, peaks = [[1, 2, 3], [4, 5, 6, 7]], []
    options = {"max_new_tokens": 6, "temperature": 0.0, "compute": XLA}

    def written(steer):
        given = {"steer": steer, "on_peak": peaks.append}
        return decode.generate(spec, model, params, state, prompts, **options, **given)

    @jax.jit
    def logits(batch, steer):
        ctx = TASK.context(batch, mode="decode", compute=XLA, steer=steer)
        return spec.merge(params, state)(ctx)[0]

    plain = written(None)
    assert peaks == []
    before = decode._generate._cache_size()
    assert written(arrays(model, scale={0: 1.0})) == plain
    factors = {e: 6.0 for e in range(8)}
    for steer in (arrays(model, scale=factors), arrays(model, ban=(0, 1, 2, 3))):
        for prompt, own in zip(prompts, written(steer), strict=True):
            tokens = np.zeros((1, 16), np.int32)
            tokens[0, : len(prompt) + 6] = [*prompt, *own]
            batch = {"tokens": tokens, "segment": np.ones((1, 16), np.int32)}
            batch["position"] = np.arange(16, dtype=np.int32)[None]
            best = np.argmax(logits(batch, steer)[0], axis=-1)
            assert best[len(prompt) - 1 : len(prompt) + 5].tolist() == own
            assert own != plain[prompts.index(prompt)]
    assert decode._generate._cache_size() == before + 2
    assert len(peaks) == 3 and peaks[1] > peaks[0]
