"""Scores of continuations by hand, token by token; then tasks of the harness itself.

The harness is an extra: what needs it is marked `hf`, and skipped where it is missing.
"""

import dataclasses
import json
import math
import socket
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.data.tokenizer import Tokenizer
from moex.model.decode import generate
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.topk import TopK
from moex.nn.stack import Segment
from moex.runs.directory import RunDir
from moex.runs.open import LoadedRun
from moex.serve import harness, likelihood
from moex.serve.harness import HarnessLM, score_tasks
from moex.serve.likelihood import continuation_scores
from tests import runs
from tests.helpers import XLA, built, context, mesh_of, tiny_lm, tiny_moe

SEQ_LEN = 40
DOC = 256
# As the harness rounds nothing, what differs is the order of float32 sums.
CLOSE = {"rel": 1e-5, "abs": 1e-4}


def loaded(folder, model=None, mesh=None) -> LoadedRun:
    """A run of random parameters, as `load_run` would give it."""
    cfg = runs.config(folder, f"seq_len={SEQ_LEN}")
    cfg.model = model or tiny_lm(
        # A capacity that would drop most slots, if it were heeded.
        Segment(pattern=(tiny_moe(router=TopK(k=2), capacity_factor=0.3),)),
        vocab=257,
    )
    spec, params, state = built(cfg.model)
    tokenizer = Tokenizer(None, doc_id=DOC, vocab_size=257)
    arrays = {"params": params, "state": state}
    own = {"cfg": cfg, "mesh": mesh or mesh_of(), "spec": spec}
    run = LoadedRun(**own, folder=RunDir(folder), step=7, **arrays)
    run.tokenizer = tokenizer
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def next_logits(run):
    """Tokens -> logits of the next one, of a row alone and always of one length."""

    def logits(params, token_1L, length):
        place_1L = jnp.arange(64)[None]
        ctx = context(
            1,
            64,
            token_BL=token_1L,
            segment_BL=(place_1L < length).astype(jnp.int32),
            compute=XLA,
            mode="decode",
        )
        return run.spec.merge(params, run.state)(ctx)[0][0, length - 1]

    logits = jax.jit(logits)

    def of(tokens):
        tokens = tokens[-SEQ_LEN:]
        token_1L = jnp.array([tokens + [0] * (64 - len(tokens))], jnp.int32)
        return np.asarray(logits(run.params, token_1L, len(tokens)), np.float64)

    return of


@pytest.fixture(scope="module")
def slowly(next_logits):
    """The definition: one token at a time, on a window that never changes its start."""

    def score(before, after):
        start = max(0, len(before) + len(after) - 1 - SEQ_LEN)
        tokens, total, greedy = [*before, *after], 0.0, True
        for i in range(len(before), len(tokens)):
            logits_V = next_logits(tokens[start:i])
            shifted_V = logits_V - logits_V.max()
            total += shifted_V[tokens[i]] - np.log(np.exp(shifted_V).sum())
            greedy &= int(logits_V.argmax()) == tokens[i]
        return total, greedy

    return score


def pairs_of(next_logits):
    """Short, long and cut contexts; random continuations, and greedy ones."""
    rng = np.random.default_rng(0)
    sizes = (
        (1, 1),
        (1, 3),
        (9, 8),
        (12, 4),
        (12, 6),
        (30, 5),
        (39, 2),
        (60, 7),
        (1, 40),
    )
    pairs = [tuple(rng.integers(0, 256, n).tolist() for n in pair) for pair in sizes]
    for before, _ in pairs[2:6]:
        after = []
        for _ in range(3):
            after.append(int(next_logits(before + after).argmax()))
        pairs.append((before, after))
    return pairs


def assert_close(actual, expected):
    assert [g for _, g in actual] == [g for _, g in expected]
    assert [s for s, _ in actual] == [pytest.approx(s, **CLOSE) for s, _ in expected]


def test_scores_are_those_of_one_token_at_a_time(run, next_logits, slowly):
    pairs = pairs_of(next_logits)
    expected = [slowly(*pair) for pair in pairs]
    assert any(g for _, g in expected) and not all(g for _, g in expected)
    assert_close(continuation_scores(run, pairs), expected)


def test_a_score_is_the_same_bits_in_any_batch(run, next_logits):
    pairs = pairs_of(next_logits)
    together = continuation_scores(run, pairs)
    assert continuation_scores(run, pairs[::-1]) == together[::-1]
    assert [continuation_scores(run, [p])[0] for p in pairs] == together
    assert continuation_scores(run, pairs * 9) == together * 9


@pytest.mark.thorough
def test_few_programs_are_compiled(run):
    likelihood._scores.clear_cache()
    pairs = [([DOC] * n, [1]) for n in range(1, 60)]
    continuation_scores(run, pairs)
    assert likelihood._scores._cache_size() == 3  # rows of 16, 32 and 40 tokens


def test_padding_is_no_token_of_any_document():
    batch = likelihood._batch([([DOC, 1], [2, 3]), ([4] * 9, [5])], B=3, L=4)
    assert batch["tokens"].tolist() == [[DOC, 1, 2, 0], [4, 4, 4, 4], [0] * 4]
    assert batch["targets"].tolist() == [[1, 2, 3, 0], [4, 4, 4, 5], [0] * 4]
    assert batch["segment"].tolist() == [[1, 1, 1, 0], [1] * 4, [0] * 4]
    assert batch["position"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0] * 4]
    assert batch["scored"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 1], [0] * 4]


def test_nothing_to_score(run):
    assert continuation_scores(run, []) == []
    assert continuation_scores(run, [([DOC], []), ([1, 2], [])]) == [(0.0, True)] * 2


@pytest.mark.thorough
def test_on_a_mesh(tmp_path, run, next_logits):
    pairs = pairs_of(next_logits)
    meshed = loaded(tmp_path, mesh=mesh_of(4, data=2, seq=2))
    assert_close(continuation_scores(meshed, pairs), continuation_scores(run, pairs))


@pytest.mark.parametrize("pair", [([], [1]), ([1], [2] * (SEQ_LEN + 1))])
def test_pairs_that_have_no_score(run, pair):
    with pytest.raises(ValueError, match=r"pair 1 has \d+ and \d+ tokens"):
        continuation_scores(run, [([1], [2]), pair])


@pytest.mark.parametrize(
    ("length", "parts", "padded"),
    [(0, 1, 16), (1, 1, 16), (16, 1, 16), (17, 1, 32), (33, 1, 40), (40, 1, 40)]
    + [(3, 5, 20), (17, 5, 35)],
)
def test_padded_length(length, parts, padded):
    assert likelihood.padded_length(length, SEQ_LEN, parts) == padded


def test_without_the_package_one_line_names_the_extra(monkeypatch, run):
    monkeypatch.setattr(harness, "TemplateLM", object)
    stored = runs.ROOT / "tests/stored_run/run"  # only its config is read
    for call in (lambda: HarnessLM(run), lambda: score_tasks(stored, ["a.yaml"])):
        with pytest.raises(ConfigError, match=r"lm_eval is missing.*moex\[eval\]"):
            call()


# With the package. Tasks are a YAML file and a JSONL file, and the network is cut.


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def no_network(*args, **kwargs):
        raise AssertionError(f"an offline task asked for {args}")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)


def write_task(folder, name, documents, **fields):
    """The path of a YAML file whose documents lie beside it."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task | fields))  # JSON is YAML
    return str(path)


def metric(name, **fields):
    return {"metric": name} | fields


def ids(text):
    return list(text.encode())


QUESTIONS = [
    {
        "question": question,
        "choices": ["house", "river", "garden", "bread" * (1 + i % 2)],
        "label": i % 4,
    }
    for i, question in enumerate(
        ["the cat sees the red", "", "a dog hears a long", "we", "my old friend " * 4]
        + [f"the small bird number {i} finds" for i in range(7)]
    )
]
DOCUMENTS = [{"text": "the cat sees. " * n} for n in (1, 3, 9)] + [{"text": "é"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory of a few steps."""
    folder = tmp_path_factory.mktemp("run")
    workdir = folder / "trained"
    with runs.one_device():
        runs.train(folder, workdir, "steps=4", f"seq_len={SEQ_LEN}")
    return workdir


@pytest.mark.hf
def test_multiple_choice(offline, run, slowly, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "load_run", lambda *args, **kwargs: run)
    task = write_task(
        tmp_path,
        "places",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="choices",
        doc_to_target="label",
        metric_list=[metric("acc"), metric("acc_norm")],
    )
    result = score_tasks(tmp_path, [task])
    acc = acc_norm = 0
    for question in QUESTIONS:
        before = [DOC, *ids(question["question"].rstrip())]
        # The harness moves spaces at the end of a context into the continuation.
        space = question["question"][len(question["question"].rstrip()) :] + " "
        scores = [slowly(before, ids(space + c))[0] for c in question["choices"]]
        each = [s / len(c) for s, c in zip(scores, question["choices"], strict=True)]
        acc += int(np.argmax(scores)) == question["label"]
        acc_norm += int(np.argmax(each)) == question["label"]
    figures = result["tasks"]["places"]
    assert 0 < acc < len(QUESTIONS)
    assert figures["acc,none"] == pytest.approx(acc / len(QUESTIONS))
    assert figures["acc_norm,none"] == pytest.approx(acc_norm / len(QUESTIONS))
    assert 0 < figures["acc_stderr,none"] < 1
    (line,) = (tmp_path / "harness.jsonl").read_text().splitlines()
    assert json.loads(line) == result
    assert result["step"] == 7
    few = score_tasks(tmp_path, ["places"], include_path=str(tmp_path), limit=2)
    assert few["tasks"]["places"]["sample_len"] == few["limit"] == 2
    assert len((tmp_path / "harness.jsonl").read_text().splitlines()) == 2
    for name, value in (("num_fewshot", -1), ("limit", 0)):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} = {value}:"):
            score_tasks(tmp_path, ["places"], **{name: value})


@pytest.mark.hf
def test_rolling_perplexity(offline, run, slowly, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "load_run", lambda *args, **kwargs: run)
    task = write_task(
        tmp_path,
        "prose",
        DOCUMENTS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[metric("bits_per_byte"), metric("byte_perplexity")],
    )
    total = num_bytes = 0
    for document in DOCUMENTS:
        tokens = [DOC, *ids(document["text"])]
        num_bytes += len(tokens) - 1
        # Every token once; the last window reaches back to be full.
        for start in range(1, len(tokens), SEQ_LEN):
            end = min(start + SEQ_LEN, len(tokens))
            first = max(0, end - 1 - SEQ_LEN)
            total += slowly(tokens[first:start], tokens[start:end])[0]
    figures = score_tasks(tmp_path, [task])["tasks"]["prose"]
    bits = -total / num_bytes / math.log(2)
    assert figures["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert figures["byte_perplexity,none"] == pytest.approx(2**bits, rel=1e-5)


@pytest.mark.hf
def test_generate_until(offline, run, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "load_run", lambda *args, **kwargs: run)
    args = (run.spec, run.cfg.model, run.params, run.state)

    def answer(question):
        prompt = [DOC, *ids(question)][-(SEQ_LEN - 8) :]
        (output,) = generate(
            *(*args, [prompt]), max_new_tokens=8, temperature=0, stop_tokens=[DOC]
        )
        return run.tokenizer.decode(output)

    texts = [q["question"] for q in QUESTIONS]
    stop = answer(texts[0])[3]
    wanted = [answer(text).split(stop)[0] for text in texts]
    wanted[3] += "not this"
    task = write_task(
        tmp_path,
        "ends",
        [{"text": t, "end": w} for t, w in zip(texts, wanted, strict=True)],
        output_type="generate_until",
        doc_to_text="text",
        doc_to_target="end",
        generation_kwargs={"until": [stop], "max_gen_toks": 8, "do_sample": False},
        metric_list=[metric("exact_match")],
    )
    figures = score_tasks(tmp_path, [task])["tasks"]["ends"]
    assert figures["exact_match,none"] == pytest.approx(1 - 1 / len(texts))


def requests(*args):
    return [types.SimpleNamespace(args=a) for a in args]


@pytest.mark.hf
def test_samples_do_not_depend_on_the_batch(offline, run):
    model = HarnessLM(run)
    options = {"do_sample": True, "temperature": 1.0, "until": [], "max_gen_toks": 8}
    asked = requests(("the", options), ("a", options), ("the", options))
    first, other, again = model.generate_until(asked)
    assert model.generate_until(asked[1:]) == [other, first]
    assert first != again  # a repeat is another sample


@pytest.mark.hf
def test_texts_of_any_length(offline, run, slowly):
    """A long context loses its start; a long continuation is scored in windows."""
    model = HarnessLM(run)
    long = "the cat sees the red house. " * 3
    pairs = [("", "a"), (" ", "a"), (long, "river"), ("a", ""), ("a", long)]
    *scores, whole = model.loglikelihood(requests(*pairs))
    expected = [([DOC], ids("a")), ([DOC], ids(" a")), (ids(long[:-1]), ids(" river"))]
    assert_close(scores, [slowly(*pair) for pair in expected] + [(0.0, True)])
    (rolling,) = model.loglikelihood_rolling(requests((long,)))
    assert model.loglikelihood_rolling(requests(("",), (long,))) == [0, rolling]
    assert len(long) > 2 * SEQ_LEN
    assert whole[0] == pytest.approx(rolling, abs=20)  # another first context


@pytest.mark.hf
@pytest.mark.parametrize("begin", [None, 3])
def test_texts_of_an_imported_model(offline, run, slowly, begin):
    """Its own begin token or none, and one other than the end before whole texts."""
    tokenizer = Tokenizer(None, doc_id=DOC, vocab_size=257).begin(begin, 3)
    tokenizer.stop_at([7])
    model = HarnessLM(dataclasses.replace(run, tokenizer=tokenizer))
    pairs = [("the cat", " sees"), ("", "a"), (" ", "a")]
    first = [] if begin is None else [begin]
    expected = [(first + ids("the cat"), ids(" sees")), ([3], ids("a"))]
    expected.append(([3], ids(" a")))
    assert_close(
        model.loglikelihood(requests(*pairs)), [slowly(*pair) for pair in expected]
    )
    (rolling,) = model.loglikelihood_rolling(requests(("the cat",)))
    assert rolling == pytest.approx(slowly([3], ids("the cat"))[0], **CLOSE)
    asked = []

    def answer(*args, stop_tokens, **options):
        asked.extend((prompt, *stop_tokens) for prompt in args[4])
        return [[]] * len(args[4])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "generate", answer)
        options = {"until": [], "max_gen_toks": 8}
        model.generate_until(requests(("the cat", options), ("", options)))
    assert (first + ids("the cat"), 7, DOC) in asked and ([3], 7, DOC) in asked


@pytest.mark.hf
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, r"generation_kwargs\.num_beams: must be one of until, "),
        ({"max_gen_toks": SEQ_LEN}, r"max_gen_toks = 40: must be in \[1, 40\)"),
    ],
)
def test_generation_that_a_run_cannot_do(offline, run, options, message):
    with pytest.raises(ConfigError, match=message):
        HarnessLM(run).generate_until(requests(("a", {"until": []} | options)))


@pytest.mark.hf
def test_mistakes(offline, run, trained, tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml'.*must be a file that exists"):
        score_tasks(trained, [str(tmp_path / "no.yaml")])
    with pytest.raises(ConfigError, match="'hellaswagg'.*Did you mean 'hellaswag'"):
        score_tasks(trained, ["hellaswagg"])
    chosen = tiny_lm(Segment(pattern=(tiny_moe(router=ExpertChoice(k=1.0)),)))
    with pytest.raises(ConfigError, match="router: .*no score is fair"):
        HarnessLM(types.SimpleNamespace(cfg=types.SimpleNamespace(model=chosen)))


@pytest.mark.hf
def test_a_run_directory(offline, trained, tmp_path, capsys):
    """From a checkpoint; standard output stays free for the result."""
    task = write_task(
        tmp_path,
        "last",
        [{"text": "the cat sees", "end": "the red house"}] * 3,
        output_type="loglikelihood",
        doc_to_text="text",
        doc_to_target="end",
        metric_list=[metric("perplexity"), metric("acc")],
    )
    with runs.one_device():
        result = score_tasks(trained, [task])
    assert result["step"] == 4
    assert 1 < result["tasks"]["last"]["perplexity,none"] < 1e30
    assert capsys.readouterr().out == ""
    assert (trained / "harness.jsonl").exists()
