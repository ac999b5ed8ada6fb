"""Whole traces: files, `analyse`, `compare`, and the verb."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moex import cli
from moex.analysis import output, summary, writer
from moex.analysis import statistics as stats
from moex.analysis.summary import analyse, compare
from moex.analysis.trace import SHARED, Trace
from moex.config.base import ConfigError
from tests.analysis import oracle

BLOCK = 16


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(path, path with all logits, chunks): 45 tokens in blocks of 16."""
    folder = tmp_path_factory.mktemp("traces")
    rng = np.random.default_rng(0)
    chunks = [oracle.random_chunk(rng, n, logits=True) for n in (5, 30, 10)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "BLOCK", BLOCK)
        plain = oracle.write(folder / "plain.parquet", chunks)
        full = oracle.write(folder / "full.parquet", chunks, logits=True)
    return plain, full, chunks


@pytest.fixture(scope="module")
def whole(written):
    """(tokens, {label: slots}) of all chunks at once."""
    return writer._joined([writer.Chunk(tokens=t, layers=s) for t, s in written[2]])


def test_a_file_gives_back_what_was_written_block_by_block(written, whole):
    for path in written[:2]:
        full = path == written[1]
        with Trace.open(path) as trace:
            read = list(trace.chunks(logits=full))
            assert trace.header == oracle.header(logits=full)
            (alone,) = list(trace.chunks(["003.2"], values=("logit",)))[:1]
            assert [len(c.tokens) for c in trace.chunks([])] == [16, 16, 13]
        assert alone.layers.keys() == {"003.2"}
        assert alone.layers["003.2"].gate_NK is None
        assert [len(c.tokens) for c in read] == [16, 16, 13]
        for name in SHARED:
            got = np.concatenate([getattr(c.tokens, f"{name}_N") for c in read])
            np.testing.assert_array_equal(got, getattr(whole.tokens, f"{name}_N"))
        for label, want in whole.layers.items():
            parts = [c.layers[label] for c in read]
            names = ("expert_NK", "keep_NK", "gate_NK", "logit_NK", "prob_NK")
            for name in (*names, *(["logits_NE"] if full else [])):
                got = np.concatenate([getattr(p, name) for p in parts])
                np.testing.assert_array_equal(got, getattr(want, name), err_msg=name)


def test_the_analysis_is_what_loops_give(written, whole):
    tokens, layers = whole.tokens, whole.layers
    with Trace.open(written[0]) as trace:
        found = analyse(trace, markers=["<think>"], min_count=1, rows=2)
    assert (found.num_tokens, found.num_ids, found.step) == (45, 4, 7)
    np.testing.assert_array_equal(found.tokens_D, [*np.bincount(tokens.domain_N), 0])
    bucket_N = stats.position_bucket(tokens.position_N)
    assert found.positions == ("0", "1", "2-3", "4-7", "8-15")
    np.testing.assert_array_equal(found.tokens_P, np.bincount(bucket_N))
    other_N = (tokens.token_N != 2).astype(int)
    for label, slots in layers.items():
        layer, own = found.layers[label], found.layers[label].info
        E, domain_N = own.num_choices, tokens.domain_N
        experts = oracle.experts(slots)
        same = np.testing.assert_array_equal
        same(layer.load_E, np.bincount(sum(experts, []), minlength=E))
        same(layer.domain_DE, oracle.grouped(domain_N, slots, 3, E))
        same(layer.position_PE, oracle.grouped(bucket_N, slots, 5, E))
        same(layer.size_DK, oracle.sizes(domain_N, slots, 3, own.num_experts))
        same(layer.coactivation_EE, oracle.pairs(slots, slots, E, E))
        same(layer.hits_ME, oracle.grouped(other_N, slots, 2, E)[:1])
        gate_E = np.zeros(E)
        for row in oracle.lists(slots):
            for e, gate, _ in row:
                gate_E[e] += gate
        bare = dataclasses.replace(slots, logits_NE=None)
        limit_D = oracle.thresholds(bare, domain_N, 3, None)
        close = [
            (layer.gate_E, gate_E),
            (layer.threshold_D, limit_D),
            (
                layer.tcess_DE,
                oracle.selection_scores(bare, domain_N, 3, E, None, None, False),
            ),
            (
                layer.peu_DE,
                oracle.selection_scores(bare, domain_N, 3, E, None, limit_D, True),
            ),
            (layer.npmi_ME[0], oracle.npmi(tokens.token_N, slots, 2, E)),
        ]
        for got, want in close:
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)
        count_VE = oracle.grouped(tokens.token_N, slots, 4, E)
        share_VE = count_VE / found.tokens_V[:4, None]
        for e in range(E):
            best = sorted(range(4), key=lambda v: (-share_VE[v, e], -count_VE[v, e]))
            shown = [v for v in best[:2] if count_VE[v, e]]
            assert [i for i in layer.id_ER[e] if i >= 0] == shown
            same(layer.count_ER[e][: len(shown)], count_VE[shown, e])
    assert [(s.source, s.target, s.kind) for s in found.steps] == [
        ("001", "003.1", "layer"),
        ("003.1", "003.2", "round"),
        ("003.2", "004", "layer"),
    ]
    for step in found.steps:
        a, b = layers[step.source], layers[step.target]
        same(step.pairs_AB, oracle.pairs(a, b, *step.pairs_AB.shape))
        want = np.zeros(step.top_AB.shape, int)
        for one, two in zip(oracle.tops(a), oracle.tops(b), strict=True):
            if min(one, two) >= 0:
                want[one, two] += 1
        same(step.top_AB, want)


def test_pools_beyond_the_chosen_need_all_logits(written, whole):
    with Trace.open(written[0]) as trace:
        with pytest.raises(ConfigError, match="layer 001 allows 1 to 3"):
            analyse(trace, pool=4)
        with pytest.raises(ConfigError, match=r"moex trace --logits"):
            next(trace.chunks(logits=True))
    with Trace.open(written[1]) as trace:
        found = analyse(trace, pool=2)
    for label, slots in whole.layers.items():
        of = slots, whole.tokens.domain_N, 3
        E = found.layers[label].info.num_choices
        want = oracle.selection_scores(*of, E, 2, oracle.thresholds(*of, 2), True)
        np.testing.assert_allclose(found.layers[label].peu_DE, want, rtol=1e-6)


def test_an_analysis_is_saved_and_read_again(written, tmp_path):
    with Trace.open(written[0]) as trace:
        found = analyse(trace, markers=[" c"], min_count=1)
    output.save(found, tmp_path / "a.npz")
    again = output.load(tmp_path / "a.npz")
    for field in dataclasses.fields(found):
        if field.name not in ("layers", "steps"):
            one, two = (getattr(a, field.name) for a in (found, again))
            np.testing.assert_array_equal(one, two)
            assert type(one) is type(two)
    for one, two in zip(
        [*found.layers.values(), *found.steps],
        [*again.layers.values(), *again.steps],
        strict=True,
    ):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(
                getattr(one, field.name), getattr(two, field.name)
            )
    assert list(again.layers) == list(found.layers)
    (tmp_path / "b.npz").write_text("no")
    with pytest.raises(ConfigError, match="not an analysis"):
        output.load(tmp_path / "b.npz")


def test_two_traces_are_compared(written, whole, tmp_path):
    rng = np.random.default_rng(5)
    tokens = whole.tokens
    slots = {i.label: oracle.random_slots(rng, 45, i) for i in oracle.INFOS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "BLOCK", BLOCK)
        path = oracle.write(tmp_path / "late.parquet", [(tokens, slots)])
        moved = dataclasses.replace(tokens, token_N=tokens.token_N.copy())
        moved.token_N[33] += 1
        other = oracle.write(tmp_path / "moved.parquet", [(moved, slots)])
    with Trace.open(written[0]) as one, Trace.open(path) as two:
        sums, own = compare(one, two), compare(one, one)
        with (
            Trace.open(other) as three,
            pytest.raises(ConfigError, match="of other data; .* token of token 33"),
        ):
            compare(one, three)
    for label, sums_D2 in sums.items():
        got = stats.saturation(sums_D2.sum(axis=0)[None])
        want = oracle.overlap(whole.layers[label], slots[label])
        np.testing.assert_allclose(got, [want], rtol=1e-6)
        np.testing.assert_array_equal(own[label][:, 0], own[label][:, 1])


def test_traces_that_cannot_be_compared(written, tmp_path):
    rng = np.random.default_rng(5)
    chunk = oracle.random_chunk(rng, 4)
    short = oracle.write(tmp_path / "short.parquet", [chunk])
    fewer = oracle.write(tmp_path / "fewer.parquet", [chunk], layers=oracle.INFOS[:1])
    with Trace.open(written[0]) as one:
        with Trace.open(short) as two, pytest.raises(ConfigError, match="45 tokens"):
            compare(one, two)
        with Trace.open(fewer) as two, pytest.raises(ConfigError, match="layer 003.1"):
            compare(one, two)


# Files.


def test_an_interrupted_trace_leaves_no_file(tmp_path):
    chunk = oracle.random_chunk(np.random.default_rng(0), 4)
    with (
        pytest.raises(KeyboardInterrupt),
        writer.TraceWriter(tmp_path / "t.parquet", oracle.header()) as out,
    ):
        out.write(*chunk)
        assert [p.name for p in tmp_path.iterdir()] == ["t.parquet.partial"]
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_traces(written, tmp_path):
    text, table = tmp_path / "text", tmp_path / "table.parquet"
    text.write_text("x" * 100)
    pq.write_table(pa.table({"a": [1]}), table)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(written[0].read_bytes()[:-100])
    again = tmp_path / "again.parquet"
    pq.write_table(pq.read_table(written[0]), again)
    newer = tmp_path / "newer.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moex.analysis.header.VERSION", 2)
        chunk = oracle.random_chunk(np.random.default_rng(0), 4)
        oracle.write(newer, [chunk])
    for path, said in (
        (tmp_path / "none", "no such file"),
        (text, "not a Parquet file"),
        (cut, "not a Parquet file"),
        (table, "not a trace of moex"),
        (again, "another program"),
        (newer, "version 2; this moex reads 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            Trace.open(path)


def test_layers_and_markers_that_are_not_there(written, tmp_path):
    with Trace.open(written[0]) as trace:
        with pytest.raises(ConfigError, match="no layer '003'.*Layers are 001, 003.1"):
            next(trace.chunks(["003"]))
        with pytest.raises(ConfigError, match="'think': .* mean '<think>'"):
            analyse(trace, markers=["think"])
        with pytest.raises(ConfigError, match="'d': does not occur"):
            analyse(trace, markers=["d"])
    empty = oracle.write(tmp_path / "empty.parquet", [])
    with Trace.open(empty) as trace, pytest.raises(ConfigError, match="has no tokens"):
        analyse(trace)


def test_ids_are_bounded(written, monkeypatch):
    monkeypatch.setattr(summary, "MOST_IDS", 2)
    with Trace.open(written[0]) as trace:
        found = analyse(trace, min_count=1)
    assert found.num_ids == 2
    common = set(np.argsort(-found.tokens_V, kind="stable")[:2])
    for layer in found.layers.values():
        assert set(layer.id_ER.ravel()) <= common | {-1}


# The verb.


def test_the_verb_prints_a_table(written, tmp_path, capsys):
    out = tmp_path / "a.npz"
    args = ["analyse", str(written[0]), f"--compare={written[1]}", "--token=<think>"]
    cli.main([*args, f"--out={out}"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "runs/x at step 7, 45 tokens:"
    assert said[1].split()[0] == "layer" and said[1].split()[-1] == "same"
    assert [line.split()[0] for line in said[2:6]] == ["001", "003.1", "003.2", "004"]
    assert said[2].split()[-1] == "1.0000" and "'<think>'" in said[6]
    assert said[7] == "" and said[8].startswith("  experts: experts that compute")
    found = output.load(out)
    cli.main([*args, "--json"])
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert rows["003.1"]["repeats"] == pytest.approx(
        np.trace(found.steps[1].pairs_AB) / found.layers["003.1"].load_E.sum()
    )
    with pytest.raises(SystemExit):
        cli.main([*args, f"--out={out}"])
    assert "exists" in capsys.readouterr().err


def test_the_table_explains_every_column_that_it_has():
    rows = {
        "000": {"experts_per_token": 2.0, "dead_frac": 0.0, "next_given": 0.5},
        "001": {"experts_per_token": 2.0, "dead_frac": 0.25, "saturation": 0.75},
    }
    head, first, _ = output.table(rows).splitlines()
    legend = output.legend(rows).splitlines()
    assert head.split()[1:] == [line.split(":")[0].strip() for line in legend]
    assert head.split()[1:] == ["experts", "dead", "next", "same"]
    assert first.split() == ["000", "2.0000", "0.0000", "0.5000"]
    assert all(len(line) <= 80 for line in legend)
