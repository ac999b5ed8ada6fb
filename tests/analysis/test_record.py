"""`moex trace`: what a model did is what the file says.

B batch · L length · T = B * L tokens · N tokens without padding · K slots · E experts
"""

import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moex import cli
from moex.analysis.record import (
    TokenCounter,
    layer_infos,
    routed_layers,
    slots_by_layer,
)
from moex.analysis.summary import analyse
from moex.analysis.sums import Sums
from moex.analysis.trace import Header, Trace
from moex.analysis.writer import TraceWriter
from moex.data.tokenizer import Tokenizer
from moex.model.losses import moe_layers
from moex.moe.chain import Chain
from moex.moe.experts.zero import Zero
from moex.moe.narrow import Narrow
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests import runs
from tests.helpers import TASK, XLA, built, random_batch, tiny_lm, tiny_moe
from tests.interop import parity


def model_of_all_kinds():
    """Dense, top-k with zero experts, a narrow chain of two routers, expert choice."""
    plain = {"shared": None}
    first = tiny_moe(4, router=TopK(k=2), zero=Zero(copy=2), **plain)
    rounds = Chain(
        moe=tiny_moe(4, router=TopK(k=1), **plain),
        iterations=2,
        routers=(TopP(p=0.4, k_max=3), TopK(k=1)),
    )
    with pytest.warns(match="ExpertChoice"):
        chosen = tiny_moe(4, router=ExpertChoice(k=1.5), **plain)
        chosen.router.validate("router")
    return tiny_lm(
        Segment(pattern=(Dense(hidden=8), first), repeat=2),
        Segment(pattern=(Narrow(latent=8, inner=rounds), chosen)),
    )


@pytest.fixture(scope="module")
def collected():
    """(model, two batches, what the model collects for each)."""
    model = model_of_all_kinds()
    spec, params, state = built(model)

    @jax.jit
    def run(batch):
        ctx = TASK.context(batch, mode="eval", collect=True, compute=XLA)
        aux = spec.merge(params, state)(ctx)[1]
        return aux, routed_layers(aux, logits=True)

    batches = [random_batch(4, 16, seed=seed) for seed in (0, 1)]
    return model, batches, [jax.device_get(run(batch)) for batch in batches]


def header(model, **fields):
    defaults = {
        "run": "runs/x",
        "step": 7,
        "layers": layer_infos(model),
        "tokenizer": {},
        "vocabulary": ("",) * 48,
        "domains": ("a", "b"),
        "data": {},
        "logits": True,
    }
    return Header(**defaults | fields)


@pytest.mark.thorough
def test_layers_are_numbered_with_the_dense_ones(collected):
    infos = layer_infos(collected[0])
    assert [i.label for i in infos] == ["001", "003", "004.1", "004.2", "005"]
    assert [i.router for i in infos] == ["TopK", "TopK", "TopP", "TopK", "ExpertChoice"]
    assert [i.slots for i in infos] == [2, 2, 3, 1, 4]
    assert [(i.num_experts, i.num_choices) for i in infos] == [(4, 6)] * 2 + [
        (4, 4)
    ] * 3
    assert [i.causal for i in infos] == [True] * 4 + [False]


def test_a_trace_is_what_the_model_collects(collected, tmp_path):
    """Round trip through the file, against the model's own arrays, token by token."""
    model, batches, outputs = collected
    out, counter = tmp_path / "t.parquet", TokenCounter()
    with TraceWriter(out, header(model)) as writer:
        for batch, (_, arrays) in zip(batches, outputs, strict=True):
            valid_T, tokens = counter(batch)
            writer.write(tokens, slots_by_layer(model, arrays, valid_T))
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]
    with Trace.open(out) as trace:
        (chunk,) = trace.chunks(logits=True)
    valid = [batch["segment"].reshape(-1) > 0 for batch in batches]
    assert trace.num_tokens == sum(map(np.sum, valid)) < 2 * 4 * 16  # no padding
    for name, want in (("token_N", "tokens"), ("position_N", "position")):
        flat = [b[want].reshape(-1)[v] for b, v in zip(batches, valid, strict=True)]
        np.testing.assert_array_equal(getattr(chunk.tokens, name), np.concatenate(flat))
    place = {"001": ("0", "1", 0), "003": ("0", "1", 1), "005": ("1", "1", 0)}
    place |= {"004.1": ("1", "0", 0), "004.2": ("1", "0", 0)}
    for label, (segment, block, copy) in place.items():
        at, slots = 0, chunk.layers[label]
        for (aux, _), valid_T in zip(outputs, valid, strict=True):
            layers = {path[1:4:2]: layer for path, layer in moe_layers(aux)}
            layer = layers[segment, block]
            trace, scores = layer["trace"], layer["scores"]
            if "." in label:
                t = int(label[-1]) - 1
                trace = trace[str(t)]
                scores = {k: v[:, t] for k, v in scores.items()}
            for token in np.flatnonzero(valid_T):
                want = wanted(trace, scores, copy, token)
                keep_K = slots.keep_NK[at]
                for name, values in want.items():
                    got = getattr(slots, f"{name}_NK")[at][keep_K]
                    np.testing.assert_array_equal(got, values, err_msg=label)
                row_E = scores["logits"][copy][token]
                np.testing.assert_array_equal(slots.logits_NE[at], row_E)
                at += 1
        assert at == len(slots.expert_NK)


def wanted(trace, scores, copy, token) -> dict:
    """The lists of one token, by loops over what the router returned."""
    if "token" in trace:
        chosen = [
            (e, trace["gate"][copy][e, c])
            for e, token_C in enumerate(trace["token"][copy])
            for c, t in enumerate(token_C)
            if t == token and trace["keep"][copy][e, c]
        ]
    else:
        row = [trace[k][copy][token] for k in ("expert", "gate", "keep")]
        chosen = [(e, g) for e, g, kept in zip(*row, strict=True) if kept]
    experts = np.array([e for e, _ in chosen], int)
    return {
        "expert": experts,
        "gate": np.array([g for _, g in chosen], np.float32),
        "logit": scores["logits"][copy][token][experts],
        "prob": scores["probs"][copy][token][experts],
    }


def test_documents_and_examples_are_numbered_through():
    batch = random_batch(3, 8, seed=3)
    counter = TokenCounter()
    seen = [counter(batch)[1] for _ in range(2)]
    number, want = 0, []
    for _ in range(2):
        for b in range(3):
            segments = batch["segment"][b]
            want += [number + s - 1 for s in segments if s > 0]
            number += segments.max()
    documents = np.concatenate([t.document_N for t in seen])
    np.testing.assert_array_equal(documents, want)
    assert set(seen[1].example_N) == {3, 4, 5}
    first = np.flatnonzero(np.diff(documents, prepend=-1))
    positions = np.concatenate([t.position_N for t in seen])
    np.testing.assert_array_equal(np.flatnonzero(positions == 0), first)
    domains = {0: 0, 1: 1, 2: 0}
    assert [domains[e] for e in seen[0].example_N] == seen[0].domain_N.tolist()


def test_a_limit_cuts_exactly():
    batch, counter = random_batch(3, 8, seed=3), TokenCounter(30)
    sizes = [len(counter(batch)[1]) for _ in range(3)]
    valid = int((batch["segment"] > 0).sum())
    assert sizes == [valid, 30 - valid, 0]


# The verb.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run with checkpoints of steps 4, 6 and 8, its trace)."""
    folder = tmp_path_factory.mktemp("traced")
    run, out = runs.write_trained(folder), folder / "t.parquet"
    moex("trace", run, f"--out={out}")
    return run, out


def moex(*args):
    """On one device."""
    with runs.one_device():
        cli.main([str(arg) for arg in args])


def test_the_verb_traces_every_held_out_token(trained, capsys):
    run, path = trained
    moex("eval", run, "--json")
    scored = capsys.readouterr().out
    with Trace.open(path) as trace:
        assert f'"tokens": {trace.num_tokens},' in scored
        assert list(trace.layers) == ["001"] and trace.header.step == 8
        assert len(trace.domains) == 1
        assert trace.vocabulary[97] == "a" and trace.vocabulary[256] == "<|doc|>"
        (chunk,) = trace.chunks()
    assert np.all(chunk.tokens.position_N[chunk.tokens.token_N == 256] == 0)
    text = "".join(trace.vocabulary[i] for i in chunk.tokens.token_N[1:40])
    assert text in (run.parent / "corpus.txt").read_text()
    assert chunk.layers["001"].keep_NK.all()


@pytest.mark.thorough
def test_a_mesh_gives_the_same_trace(trained, tmp_path):
    """On 8 devices, experts split: the same tokens, the same experts."""
    run, path = trained
    out = tmp_path / "t.parquet"
    mesh = ["--config.mesh.data=4", "--config.mesh.expert=2"]
    cli.main(["trace", str(run), f"--out={out}", *mesh])
    with Trace.open(path) as one, Trace.open(out) as two:
        a, b = next(one.chunks()), next(two.chunks())
    np.testing.assert_array_equal(a.tokens.token_N, b.tokens.token_N)
    np.testing.assert_array_equal(a.tokens.document_N, b.tokens.document_N)
    slots, split = a.layers["001"], b.layers["001"]
    np.testing.assert_allclose(split.prob_NK, slots.prob_NK, rtol=1e-4, atol=1e-6)
    assert np.mean(split.expert_NK == slots.expert_NK) > 0.999  # but for near ties


def test_the_file_is_plain_parquet(trained):
    table = pq.read_table(trained[1])
    assert table.column_names[:5] == [
        *("example", "position", "document", "token", "domain")
    ]
    assert table.schema.field("expert").type == pa.list_(pa.int16())
    assert set(table.column("layer").to_pylist()) == {1}
    row = table.slice(3, 1).to_pylist()[0]
    assert len(row["expert"]) == len(row["gate"]) == 2
    assert sum(row["gate"]) == pytest.approx(1, abs=1e-5)
    assert row["gate"] == sorted(row["gate"], reverse=True)


def test_another_step_and_fewer_tokens(trained, capsys, tmp_path):
    run, _ = trained
    out = tmp_path / "t.parquet"
    moex("trace", run, f"--out={out}", "--step=6", "--tokens=50", "--logits")
    assert "at step 6, 50 tokens, 1 routers" in capsys.readouterr().out
    with Trace.open(out) as trace:
        (chunk,) = trace.chunks(logits=True)
        assert trace.header.logits and trace.num_tokens == 50
    slots = chunk.layers["001"]
    picked_NK = np.take_along_axis(slots.logits_NE, slots.expert_NK, axis=1)
    np.testing.assert_array_equal(picked_NK, slots.logit_NK)


def test_given_files_are_traced_whole(trained, tmp_path):
    """Every token of every file once, in its order; one domain for each --data."""
    (tmp_path / "code").mkdir()
    files = {"web.txt": "the cat\n\nsees É " * 30, "code/a.py": "x=1", "code/b.py": "y"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    out, code = tmp_path / "t.parquet", f"{tmp_path}/code/*.py"
    data = [f"--data={tmp_path / 'web.txt'}", f"--data={code}"]
    moex("trace", trained[0], f"--out={out}", *data)
    tokenizer = Tokenizer.load(trained[0] / "tokenizer")
    want = [[tokenizer.doc_id, *tokenizer.encode(text)] for text in files.values()]
    with Trace.open(out) as trace:
        assert trace.domains == ("web", code)
        (chunk,) = trace.chunks()
    tokens = chunk.tokens
    assert tokens.token_N.tolist() == sum(want, [])
    assert np.bincount(tokens.domain_N).tolist() == [
        len(want[0]),
        len(sum(want[1:], [])),
    ]
    assert len(chunk.layers["001"].expert_NK) == len(tokens.token_N)


def test_prompts_and_responses_are_traced(trained, tmp_path):
    rows = [("why?", " because"), ("and?", " so")]
    lines = [json.dumps({"prompt": a, "response": b}) for a, b in rows]
    (tmp_path / "qa.jsonl").write_text("\n".join(lines))
    out = tmp_path / "t.parquet"
    moex("trace", trained[0], f"--out={out}", f"--data={tmp_path / 'qa.jsonl'}")
    with Trace.open(out) as trace:
        (chunk,) = trace.chunks()
        text = "".join(trace.vocabulary[i] for i in chunk.tokens.token_N)
    assert text == "".join("<|doc|>" + a + b for a, b in rows)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--out={old}"], "exists; give another name"),
        (["--out=/nowhere/t.parquet"], "in a folder that exists"),
        (["--out={new}", "--step=5"], "--step = 5: must be one of the checkpoints: 4"),
        (["--out={new}", "--tokens=0"], "must be at least 1"),
        (["--out={new}", "--marker=a"], "--marker: is for --sums"),
        (["--out={new}", "--sums-only", "--logits"], "--logits: is for a trace"),
        (["--out={new}", "--sums-only", "--marker=xyz"], "'xyz': not one token"),
        (["--out={new}", "--sums-only", "--pool=5"], "pool = 5: layer 001 allows 1"),
        (["--out={new}", "--config.data.sources[0].holdout=0"], "no data is held out"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(trained, capsys, tmp_path, args, said):
    run, old = trained
    new = tmp_path / "new.parquet"
    with pytest.raises(SystemExit) as stop:
        moex("trace", run, *(a.format(old=old, new=new) for a in args))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_sums_are_those_of_the_trace_beside_them(trained, tmp_path, capsys):
    run, old = trained
    out = tmp_path / "t.parquet"
    flags = ["--logits", "--sums", "--by-domain", "--marker=t", "--marker-span"]
    moex("trace", run, f"--out={out}", *flags, "a", "t")
    assert "sums of" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.parquet", "t.sums.npz"]
    sums = Sums.read(tmp_path / "t.sums.npz")
    with Trace.open(out) as trace:
        found = analyse(trace, markers=["t"])
    layer, own = found.layers["001"], sums.layers["001"]
    assert sums.tokens == found.num_tokens and sums.step == 8
    np.testing.assert_array_equal(own.count_E, layer.load_E)
    np.testing.assert_allclose(own.gate_E, layer.gate_E, rtol=1e-4)
    np.testing.assert_array_equal(own.marker_count_RE[0], layer.hits_ME[0])
    tcess_E = own.tcess_E / sums.tokens
    np.testing.assert_allclose(tcess_E, layer.tcess_DE[0], rtol=1e-3, atol=1e-5)
    (domain,) = trace.domains
    np.testing.assert_array_equal(sums.of(domain)["001"].count_E, own.count_E)


@pytest.mark.thorough
def test_a_run_is_steered_by_a_file(trained, tmp_path, capsys):
    """`moex eval`, `generate` and `trace` heed it; a factor of 1 changes nothing."""
    run, _ = trained
    one, four, ban = (tmp_path / f"{name}.json" for name in ("one", "four", "ban"))
    files = {one: {"scale": {"0": 1}}, four: {"scale": {"0": 9, "1": 9}}}
    for file, own in (files | {ban: {"ban": [0, 3]}}).items():
        layers = [{"layer": 1, "experts": 4} | own]
        file.write_text(json.dumps({"kind": "steering", "layers": layers}))

    def score(*flags):
        moex("eval", run, "--json", *flags)
        return json.loads(capsys.readouterr().out)["nll"]

    plain, steered = score(), score(f"--steer={four}")
    assert score(f"--steer={one}") == plain and abs(steered - plain) > 1e-4
    moex("trace", run, f"--out={tmp_path / 't.parquet'}", f"--steer={ban}")
    with Trace.open(tmp_path / "t.parquet") as trace:
        assert trace.header.data["steering"] == str(ban)
        (chunk,) = trace.chunks()
    assert set(chunk.layers["001"].expert_NK.flat) == {1, 2}
    capsys.readouterr()
    options = ["--prompt=the cat", "--max-new-tokens=8", "--temperature=0"]
    moex("generate", run, *options, f"--steer={four}")
    told = capsys.readouterr()
    assert told.out.startswith("the cat") and "largest |residual|" in told.err
    ban.write_text(ban.read_text().replace('"layer": 1', '"layer": 0'))
    with pytest.raises(SystemExit) as stop:
        moex("generate", run, *options, f"--steer={ban}")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "ban.json: layer 0: has no experts" in err


@pytest.mark.thorough
def test_an_imported_checkpoint_is_traced(trained, tmp_path, capsys):
    run, out, old = tmp_path / "run", tmp_path / "t.parquet", trained[0].parent
    folder = parity.FIXTURES / "mixtral"
    moex("import-hf", folder, f"--out={run}", "--config.seq_len=32")
    moex("trace", run, f"--out={out}", f"--config={old / 'tiny.py'}", "--tokens=60")
    assert "at step 0" in capsys.readouterr().out
    with Trace.open(out) as trace:
        assert trace.num_tokens == 60
        infos = trace.layers.values()
        assert {i.num_experts for i in infos} == {8} and len(infos) >= 2
        (chunk,) = trace.chunks()
        for slots in chunk.layers.values():
            assert slots.keep_NK.all()
            np.testing.assert_allclose(slots.gate_NK.sum(1), 1, rtol=1e-5)
        assert max(chunk.tokens.token_N) < len(trace.vocabulary)
