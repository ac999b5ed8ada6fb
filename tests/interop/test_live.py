"""transformers itself reads what was exported (`make test-hf`).

Random weights again, at other sizes and lengths than those of the fixtures.
"""

import dataclasses
import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from moex.convert.apply import convert_run
from moex.convert.kinds.merged import Merged
from moex.convert.kinds.pruned import Pruned
from moex.data.chat import Chat, layout_of, question
from moex.data.tokenizer import Bpe, Bytes
from moex.interop.export import export_hf
from moex.interop.families import FAMILIES
from moex.interop.hf import import_hf
from moex.model.layers import routers
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from moex.tasks.lm import continue_texts
from moex.train import training
from moex.train.job import make_job
from tests import runs
from tests.helpers import built, context
from tests.interop import make_fixtures, parity
from tests.interop.folders import changed, import_fixture, mxfp4_folder, train_on

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", "5.23", reason="needs >= 5.23")
SAY = {"say": lambda line: None}


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32"
    ).eval()


@pytest.mark.parametrize("name", parity.NAMES)
def test_an_exported_folder_has_the_same_logits(name, tmp_path):
    with runs.one_device():
        import_hf(
            parity.FIXTURES / name, tmp_path / "run", ["--config.seq_len=32"], **SAY
        )
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
    # The same machine computes both: another one's float32 sums differ by more.
    with torch.no_grad():
        found, want = (
            make_fixtures.expected(theirs(folder), "", torch)
            for folder in (tmp_path / "folder", parity.FIXTURES / name)
        )
    np.testing.assert_array_equal(found["logits"], want["logits"])
    committed = parity.expected(name)["logits"]
    np.testing.assert_allclose(found["logits"], committed, rtol=0, atol=1e-5)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_merged_model_leaves_as_its_family_with_equal_logits(name, tmp_path):
    run, said = tmp_path / "run", []
    import_fixture(name, run)
    train_on(tmp_path, run, "steps=2", "optim.warmup_steps=1")
    with runs.one_device():
        merged = Merged(groups=2, budget="uniform", calibration=4)
        convert_run(run, tmp_path / "merged", [merged], sequences=0, **SAY)
        config = export_hf(tmp_path / "merged", tmp_path / "folder", say=said.append)
        small = load_run(tmp_path / "merged")
        token_BL = np.arange(2 * 12).reshape(2, 12) % 30
        ctx = context(2, 12, token_BL=jnp.asarray(token_BL), mode="eval")
        ours, _ = small.spec.merge(small.params, small.state)(ctx)
    assert config["model_type"] == name
    assert any("written out for each choice" in line for line in said)
    with torch.no_grad():
        logits = theirs(tmp_path / "folder")(torch.tensor(token_BL)).logits.numpy()
    scale = np.abs(logits).max()
    np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-5 * scale)
    again = tmp_path / "again"
    with runs.one_device():  # an import has a set of weights for each expert
        import_hf(tmp_path / "folder", again, ["--config.seq_len=32"], **SAY)
        whole = load_run(again)
        found, _ = whole.spec.merge(whole.params, whole.state)(ctx)
    np.testing.assert_allclose(found, ours, rtol=0, atol=2e-5 * scale)


def test_an_mxfp4_folder_has_the_same_logits_unpacked(tmp_path):
    folder = mxfp4_folder(tmp_path)
    with runs.one_device():
        import_hf(folder, tmp_path / "run", ["--config.seq_len=32"], **SAY)
        export_hf(tmp_path / "run", tmp_path / "back", **SAY)
    load = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained,
        attn_implementation="eager",
        dtype="bfloat16",  # the others too: it unpacks to this one only
    )
    settings = transformers.Mxfp4Config(dequantize=True)
    unpacked = load(folder, quantization_config=settings)
    with torch.no_grad():
        found, want = (
            make_fixtures.expected(model.float().eval(), "", torch)["logits"]
            for model in (load(tmp_path / "back"), unpacked)
        )
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


SPARSE = MoE(num_experts=4, router=TopK(k=2), experts=Glu(hidden=16))
PLAIN = MoE(num_experts=4, router=TopK(k=2, normalize="none"), experts=Glu(hidden=16))
NATIVE = {
    "mixtral": (False, (SPARSE, SPARSE)),
    "qwen3_moe": (True, (Dense(hidden=24), SPARSE)),
    "olmoe": ("whole", (PLAIN, PLAIN)),
    "llama": (False, (Dense(hidden=24),)),
    "qwen3": (True, (Dense(hidden=24),)),
}


@pytest.mark.parametrize("kind", NATIVE)
def test_a_native_model_is_its_closest_family(kind, tmp_path):
    qk_norm, pattern = NATIVE[kind]
    cfg = runs.config(tmp_path)
    cfg.model = dataclasses.replace(
        cfg.model,
        layers=(Segment(pattern=pattern),),
        attention=Attention(heads=2, kv_heads=1, qk_norm=qk_norm),
    )
    with runs.one_device():
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        runs.write(job, {"params": params, "state": state}, tmp_path / "run")
        config = export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
        run = load_run(tmp_path / "run")
        token_BL = np.arange(2 * 12).reshape(2, 12) % 100
        ctx = context(2, 12, token_BL=jnp.asarray(token_BL), mode="eval")
        ours, _ = run.spec.merge(run.params, run.state)(ctx)
    assert config["model_type"] == kind
    model = theirs(tmp_path / "folder")
    assert model.config.eos_token_id == run.tokenizer.doc_id
    with torch.no_grad():
        logits = model(torch.tensor(token_BL)).logits.numpy()
    scale = np.abs(logits).max()
    np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-5 * scale)


def native(folder, tokenizer):
    """The config of a run that a family of transformers has."""
    fields = ("model.attention.qk_norm=True", "eval.every=0", "steps=4")
    bias = "model.layers[1].pattern[0].router.bias_rate=0.0"
    cfg = runs.config(folder, *fields, bias)
    cfg.data = dataclasses.replace(cfg.data, tokenizer=tokenizer)
    return cfg


def greedy(run, prompts, most=24):
    """The texts of `moex generate` at temperature 0."""
    arrays = {"params": run.params, "state": run.state}
    options = {"max_new_tokens": most, "temperature": 0}
    return continue_texts(run, arrays, run.tokenizer, prompts, **options)


def opened(folder):
    """(tokenizer, model) as transformers makes them of a folder."""
    return transformers.AutoTokenizer.from_pretrained(folder), theirs(folder)


@pytest.mark.parametrize("tokenizer", [Bytes(), Bpe(vocab=300)], ids=["bytes", "bpe"])
def test_a_native_run_writes_the_same_text_in_transformers(tmp_path, tokenizer):
    """By the exported files alone, which say how a text begins and ends."""
    cfg = native(tmp_path, tokenizer)
    prompts = ["the cat sees a dog", " a  <|doc|> b\n", "caf\u00e9", ""]
    with runs.one_device():
        training.train(cfg, tmp_path / "run", **SAY)
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
        run = load_run(tmp_path / "run")
        ours = greedy(run, prompts)
    names, model = opened(tmp_path / "folder")
    for prompt, text in zip(prompts, ours, strict=True):
        inputs = names(prompt, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == run.tokenizer.prompt(prompt)
        (made,) = model.generate(**inputs, max_new_tokens=24)
        assert names.decode(made, skip_special_tokens=True) == text
    batch = names(prompts, return_tensors="pt", padding=True)
    made = model.generate(**batch, max_new_tokens=24)
    assert names.batch_decode(made, skip_special_tokens=True) == ours


def test_a_run_of_chats_lays_them_out_as_in_transformers(tmp_path):
    cfg = native(tmp_path, Bpe(vocab=300))
    file = tmp_path / "chats.jsonl"
    said = [{"role": r, "content": "a dog sees"} for r in ("user", "assistant")]
    file.write_text(20 * (json.dumps({"messages": said}) + "\n"))
    cfg.data.sources = (Chat(paths=(str(file),)),)
    layout = layout_of(cfg.data)
    with runs.one_device():
        training.train(cfg, tmp_path / "run", **SAY)
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
        run = load_run(tmp_path / "run")
        arrays = {"params": run.params, "state": run.state}
        (ours,) = continue_texts(
            *(run, arrays, run.tokenizer, ["is it?"]),
            chat=layout,
            max_new_tokens=24,
            temperature=0,
        )
    names, model = opened(tmp_path / "folder")

    def laid_out(text):
        asked = [{"role": "user", "content": text}]
        return names.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    inputs = laid_out("is it?")
    (ids,) = inputs["input_ids"].tolist()
    assert ids == question(run.tokenizer, "is it?", **layout)
    (made,) = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert names.decode(made[len(ids) :], skip_special_tokens=True) == ours


def test_a_text_ends_at_any_end_of_a_native_run(tmp_path):
    """Some tokens that the model likes become ends, as in a converted import."""
    cfg, prompts = native(tmp_path, Bytes()), ["the", "a dog", "", "our teacher"]
    with runs.one_device():
        training.train(cfg, tmp_path / "run", **SAY)
        run = load_run(tmp_path / "run")
        long = greedy(run, prompts)
        ends = {ord(text[-3]) for text in long if text.isascii()}
        run.tokenizer.stop_at(ends).save(tmp_path / "run" / "tokenizer")
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
        run = load_run(tmp_path / "run")
        ours = greedy(run, prompts)
    assert ends and ours != long
    names, model = opened(tmp_path / "folder")
    listed = sorted({256, *ends})
    assert model.config.eos_token_id == model.generation_config.eos_token_id == listed
    for prompt, text in zip(prompts, ours, strict=True):
        inputs = names(prompt, return_tensors="pt")
        (made,) = model.generate(**inputs, max_new_tokens=24)
        made = made.tolist()
        assert len(made) == inputs.input_ids.shape[1] + 24 or made.pop() in listed
        assert names.decode(made, skip_special_tokens=True) == text


def test_the_program_of_a_model_card_runs(tmp_path, monkeypatch, capsys):
    cfg = native(tmp_path, Bytes())
    with runs.one_device():
        training.train(cfg, tmp_path / "run", **SAY)
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
        run = load_run(tmp_path / "run")
        (text,) = greedy(run, list(cfg.log.sample_prompts), 64)
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    program = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "folder")
    capsys.readouterr()
    exec(program, {})
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_windows_have_the_logits_of_transformers(name, tmp_path):
    change = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    folder = changed(tmp_path, name, config=change | {"layer_types": None})
    _, spec, arrays, _ = parity.load(folder)
    want = make_fixtures.expected(theirs(folder), "", torch)
    logits_BLV, _ = spec.merge(arrays["params"], arrays["state"])(parity.context(want))
    got, whole = np.asarray(logits_BLV)[want["mask"]], parity.expected(name)["logits"]
    scale = np.abs(want["logits"]).max()
    assert np.abs(got - want["logits"]).max() <= 2e-5 * scale
    assert np.abs(got - whole).max() > 1e-2 * scale  # the windows are seen


POSITIONS = [
    ("gpt_oss", {"rope_parameters": None, "max_position_embeddings": 131072}),
    ("deepseek_v2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    ("deepseek_v3", {"rope_interleave": None, "norm_topk_prob": None}),
    ("llama", {"original_max_position_embeddings": 16}),
    ("gpt_oss", {"original_max_position_embeddings": 16}),
]


@pytest.mark.parametrize(("name", "change"), POSITIONS)
def test_misplaced_and_missing_fields_have_the_logits_of_transformers(
    name, change, tmp_path
):
    if name == "deepseek_v2":
        change["rope_parameters"]["mscale_all_dim"] = 0.7
    folder = changed(tmp_path, name, config=change)
    _, spec, arrays, _ = parity.load(folder)
    want = make_fixtures.expected(theirs(folder), "", torch)
    logits_BLV, _ = spec.merge(arrays["params"], arrays["state"])(parity.context(want))
    got, before = np.asarray(logits_BLV)[want["mask"]], parity.expected(name)["logits"]
    scale = np.abs(want["logits"]).max()
    assert np.abs(got - want["logits"]).max() <= 2e-5 * scale
    assert np.abs(got - before).max() > 1e-3 * scale


def wider(name: str, folder):
    """The folder of a family, with random weights of twice as many experts."""
    source = parity.FIXTURES / name
    config = transformers.AutoConfig.from_pretrained(source)
    field = FAMILIES[config.model_type].experts
    setattr(config, field, 2 * getattr(config, field))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, value in model.state_dict().items():
        if key.endswith("e_score_correction_bias"):
            value.normal_(std=0.1)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_pruned_model_leaves_as_its_family_with_the_same_logits(name, tmp_path):
    run, new, out = (tmp_path / part for part in ("run", "new", "out"))
    folder = parity.FIXTURES / name
    if name == "deepseek_v3":  # it needs two experts in each group
        folder = wider(name, tmp_path / "wider")
    with runs.one_device():
        import_hf(folder, run, ["--config.seq_len=32"], **SAY)
        left = next(routers(RunDir(run).config().model)).moe.num_experts // 2
        keep = Pruned(keep=(left,), score="random")
        convert_run(run, new, [keep], sequences=0, **SAY)
        export_hf(new, out, **SAY)
        pruned = load_run(new)
        ids = np.arange(3, 3 + 24, dtype=np.int32)[None]
        model = pruned.spec.merge(pruned.params, pruned.state)
        own = model(context(1, 24, token_BL=jnp.asarray(ids), mode="eval"))[0]
    loaded = theirs(out)
    with torch.no_grad():
        want = loaded(torch.from_numpy(np.int64(ids))).logits.numpy()
    scale = np.abs(want).max()
    np.testing.assert_allclose(np.asarray(own), want, rtol=0, atol=2e-5 * scale)
    field = FAMILIES[loaded.config.model_type].experts
    config = json.loads((out / "config.json").read_text())
    assert config[field] == left
