"""Adapters of every kind on one base: from files, and chosen by prompt."""

import dataclasses

import pytest

from moex.config.base import ConfigError
from moex.convert.load_kept import load_kept
from moex.convert.plans import Keep, Plan
from moex.convert.store import Pattern, Store
from moex.interop.adapter import export_adapter, import_adapter
from moex.model.layers import routers
from moex.model.paths import flat_paths
from moex.model.steering import LayerSteering, Steering
from moex.runs.base import Base, base_hash
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from moex.serve import adapters
from moex.serve.text import write_text
from moex.train.job import make_job
from tests import runs
from tests.helpers import built
from tests.marks import slow

pytestmark = pytest.mark.thorough  # each has runs to train

LORA = "LoRA(rank=2, alpha=8.0, targets=('attention', 'experts'))"
OPTIONS = {"max_new_tokens": 12, "temperature": 0.9, "seed": 3}


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


def written(folder, name, *overrides, base=None):
    """A run that was not trained, with random parameters."""
    router = "model.layers[1].pattern[0].router.bias_rate=0.0"
    cfg = runs.config(folder, router, "model.attention.qk_norm=True", *overrides)
    job = make_job(cfg, log=lambda line: None)
    _, params, state = built(cfg.model, seed=len(name))
    run = RunDir(folder / name)
    if base is not None:
        run.path.mkdir()
        Base.of(RunDir(base), 0).save(run)
    runs.write(job, {"params": params, "state": state}, run)
    return run.path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a base, two runs on it, and one of them as a folder of PEFT."""
    folder = tmp_path_factory.mktemp("served")
    base = written(folder, "plain")
    for name in ("first", "second"):
        own = f"{LORA[:-1]}, base_dtype='bfloat16')" if name == "second" else LORA
        fields = (f"init_from={base}", f"model.adapter={own}")
        written(folder, name, *fields, base=base)
    export_adapter(folder / "first", folder / "files", say=lambda line: None)
    return folder


def test_each_prompt_has_its_adapter_as_if_alone(folder):
    prompts = ["the cat", "a dog", "our teacher", "hears"]
    given = [f"{folder}/first", f"two={folder}/second", f"{folder}/files"]
    use = ["first", "two", "first", "base"]
    texts = write_text(folder / "plain", prompts, adapter=given, use=use, **OPTIONS)
    first = write_text(folder / "first", [prompts[0], prompts[2]], **OPTIONS)
    second = write_text(folder / "second", prompts[1:2], **OPTIONS)
    plain = write_text(folder / "plain", prompts[3:], **OPTIONS)
    assert texts == [first[0], *second, first[1], *plain]
    one = given[2:]
    pair = [prompts[0], prompts[2]]
    assert write_text(folder / "plain", pair, adapter=one, **OPTIONS) == first
    assert write_text(folder / "plain", pair, **OPTIONS) != first


KINDS = {
    "loramoe": "LoRAMoE(experts=2, rank=2, alpha=4.0, targets=('attention', 'ffn'))",
    "moram": "MoRAM(rank=4, k=2, alpha=4.0, targets=('attention',))",
    "v2": "AdapterV2(prompt_length=3, layers=1)",
}


@pytest.mark.parametrize("kind", [slow("loramoe"), slow("v2"), "moram"])
def test_other_kinds_come_back_from_files_of_our_own(folder, kind):
    fields = (f"init_from={folder / 'plain'}", f"model.adapter={KINDS[kind]}")
    run = written(folder, kind, *fields, base=folder / "plain")
    quiet = {"say": lambda line: None}
    export_adapter(run, folder / f"{kind}-files", **quiet)
    files = folder / f"{kind}-files"
    assert sorted(p.name for p in files.iterdir()) == [
        "moex_adapter.json",
        "moex_adapter.safetensors",
    ]
    import_adapter(folder / "plain", files, folder / f"{kind}-again", **quiet)
    old, new = load_run(run), load_run(folder / f"{kind}-again")
    assert new.cfg.model == old.cfg.model
    before, after = flat_paths(old.params), flat_paths(new.params)
    assert before.keys() == after.keys()
    own = [n for n in before if "adapters" in n or not old.spec.info[n].frozen]
    assert own
    for name in own:
        assert before[name].tobytes() == after[name].tobytes(), name


def test_the_arrays_of_the_base_are_shared(folder):
    base = load_run(folder / "plain")
    models = adapters.load_adapted(
        base, {"a": folder / "first", "b": folder / "files"}, print
    )
    own = flat_paths(base.params)
    for name in ("a", "b"):
        other = flat_paths(models[name].params)
        for path, array in own.items():
            where = other[path].unsafe_buffer_pointer()
            assert where == array.unsafe_buffer_pointer(), path


def kept_of(folder, file, keep=(3, 0, 2)):
    """A store with one task, and the steering that bans the other experts."""
    model = RunDir(folder / "plain").config().model
    keys = {own.label: [0.0] * 4 for own in routers(model)}
    layers = (Keep(layer=1, experts=4, keep=keep),)
    patterns = (Pattern(task="few", keys=keys, layers=layers),)
    facts = {"run": "plain", "step": 0, "base": base_hash(model), "pool": 1}
    Store(patterns=patterns, **facts).save(file)
    banned = tuple(e for e in range(4) if e not in keep)
    return Steering(layers=(LayerSteering(layer=1, ban=banned),))


@pytest.mark.slow
def test_adapters_go_with_a_subset_of_experts(folder, tmp_path):
    """As if the others were banned: in the experts, the router, and both at once."""
    router = "LoRA(rank=2, alpha=8.0, targets=('router', 'experts'), base_dtype='int8')"
    fields = (f"init_from={folder / 'plain'}", f"model.adapter={router}")
    run = written(folder, "router", *fields, base=folder / "plain")
    ban = kept_of(folder, tmp_path / "s.json")
    given = [f"{folder}/first", str(run), f"{folder}/files"]
    prompts, use = ["the cat", "a dog", "hears", "sees"], ["first", "router", "files"]
    how = {"adapter": given, "use": [*use, "base"], **OPTIONS}
    place, experts = folder / "plain", f"few:{tmp_path / 's.json'}"
    found = write_text(place, prompts, experts=experts, **how)
    assert found == write_text(place, prompts, steering=ban, **how)
    assert found != write_text(place, prompts, **how)
    scale = (LayerSteering(layer=1, scale={3: 2.0, 1: 5.0}),)
    both = dataclasses.replace(ban.layers[0], scale={3: 2.0})
    found = write_text(
        place, prompts, experts=experts, steering=Steering(layers=scale), **how
    )
    assert found == write_text(place, prompts, steering=Steering(layers=(both,)), **how)


@pytest.mark.slow
def test_targets_of_segments_that_are_cut_are_refused(folder, tmp_path):
    base = written(folder, "two", "model.layers[1].repeat=2")
    targets = "targets=('segments/1/*/experts/*',)"
    fields = (f"init_from={base}", f"model.adapter=LoRA(rank=2, alpha=8.0, {targets})")
    run = written(folder, "cut", *fields, "model.layers[1].repeat=2", base=base)
    plan = Plan(
        kind="keep",
        run="two",
        step=0,
        base=base_hash(RunDir(base).config().model),
        layers=(Keep(layer=2, experts=4, keep=(0, 1)),),
    )
    kept = load_kept(base, plan).run
    with pytest.raises(ConfigError, match="cut: segments/1/.*: the adapter names"):
        adapters.load_adapted(kept, {"cut": run}, print, plan)


def test_a_mistake_is_one_clear_line(folder, tmp_path):
    run, first = folder / "plain", f"{folder}/first"

    def told(match, adapter, use=(), prompts=("a", "b"), place=run):
        with pytest.raises(ConfigError, match=match):
            write_text(place, list(prompts), adapter=adapter, use=use, **OPTIONS)

    told("--use: needs --adapter", [], ["first"])
    told("the name 'first' is taken; write NAME=", [first, first])
    told("the name 'base' is taken", [f"base={first}"])
    told("--use: given 0 times for 2 prompts.*base, first, x", [first, f"x={first}"])
    told("--use=frist: must be one of .*Did you mean 'first'", [first], ["frist"])
    told("there is no such folder", [f"{folder}/gone"])
    told("is no run with adapters on a base", [f"{folder}/plain"])
    told("has adapters; fold them into the base", [first], place=folder / "second")
