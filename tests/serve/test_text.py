"""Texts that a model writes, with a tokenizer that drops the first word's space."""

import contextlib
import types

import pytest

from moex.config.base import ConfigError
from moex.data.chat import PLAIN
from moex.data.tokenizer import Bytes
from moex.nn.context import Compute
from moex.runs.directory import RunDir
from moex.serve import harness
from moex.serve.harness import HarnessLM
from moex.serve.text import write_text
from moex.tasks import lm
from tests import runs
from tests.data import zoo
from tests.helpers import tiny_lm


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.make_all()["metaspace, first"]


def new_ids(tokenizer, prompt, text):
    """What a model would have to write after the prompt."""
    return tokenizer.prompt(text)[len(tokenizer.prompt(prompt)) :]


def test_a_sample_keeps_the_space_before_its_first_word(tokenizer, monkeypatch):
    new = new_ids(tokenizer, "the cat", "the cat sees the red")
    monkeypatch.setattr(lm, "generate", lambda *args, **options: [new])
    program = types.SimpleNamespace(
        cfg=types.SimpleNamespace(model=None),
        spec=None,
        compute=lambda train: Compute(),
    )
    state = {"params": None, "state": None}
    texts = lm.continue_texts(program, state, tokenizer, ["the cat"])
    assert texts == ["the cat sees the red"]


def test_an_answer_of_a_chat_is_told_alone(monkeypatch):
    asked = {}

    def generate(spec, cfg, params, state, prompts, *, stop_tokens, **options):
        asked.update(prompts=prompts, stops=stop_tokens)
        return [list(b"Yes.")]

    monkeypatch.setattr(lm, "generate", generate)
    program = types.SimpleNamespace(
        cfg=types.SimpleNamespace(model=None),
        spec=None,
        compute=lambda train: Compute(),
    )
    state = {"params": None, "state": None}
    layout = {"template": PLAIN, "bos_token": "", "eos_token": "!"}
    own = Bytes().make("t", (None, ""), None)
    texts = lm.continue_texts(program, state, own, ["Is it?"], chat=layout)
    assert texts == ["Yes."]
    assert asked["prompts"] == [[256, *b"user:\nIs it?\n\nassistant:\n"]]
    assert asked["stops"] == {256, ord("!")}


def test_a_run_without_chats_has_no_layout_for_them(tmp_path):
    cfg = runs.config(tmp_path, "model.vocab=257")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.save_config(cfg)
    with pytest.raises(ConfigError, match="--chat: .* has no chat template"):
        write_text(run, ["a"], max_new_tokens=1, seed=0, chat=True)


@pytest.fixture
def model(tokenizer, monkeypatch):
    pytest.importorskip("lm_eval")
    cfg = types.SimpleNamespace(model=tiny_lm(), seq_len=64)
    return HarnessLM(types.SimpleNamespace(cfg=cfg, tokenizer=tokenizer))


@pytest.mark.hf
def test_an_answer_to_a_task_keeps_it_too(model, tokenizer, monkeypatch):
    for name in ("mesh", "spec", "params", "state"):
        setattr(model.run, name, None)
    new = new_ids(tokenizer, "the cat", "the cat sees the red")
    monkeypatch.setattr(harness, "generate", lambda *args, **options: [new])
    monkeypatch.setattr(harness, "eval_batch_size", lambda cfg: 1)
    model.run.compute = lambda train: Compute()
    monkeypatch.setattr(harness.jax, "set_mesh", lambda mesh: contextlib.nullcontext())
    asked = types.SimpleNamespace(args=("the cat", {"until": [], "max_gen_toks": 8}))
    assert model.generate_until([asked]) == [" sees the red"]


@pytest.mark.hf
def test_a_continuation_is_encoded_as_it_stands_in_the_text(model, tokenizer):
    for context, continuation in (("the cat", " sees"), ("the ca", "t"), ("t", "he")):
        before, after = model._encode_pair(context, continuation)
        assert after
        text = tokenizer.continuation(before, after)
        assert text == continuation, (context, continuation)
