"""Texts that a model writes, with a tokenizer that drops the first word's space."""

import contextlib
import types

import pytest

from moex.nn.context import Compute
from moex.serve import harness
from moex.serve.harness import HarnessLM
from moex.tasks import lm
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
