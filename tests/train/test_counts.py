"""What was counted, and means of it: however a run or an evaluation is cut up.

B batch · L length · E experts
"""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.data.batches import stack
from moex.data.packing import blank_example
from moex.nn.stack import Segment
from moex.runs.consumed import Consumed
from moex.runs.score import evaluate, make_eval_step
from moex.train.lines import speed
from moex.train.loop import Run
from moex.train.stopwatch import Stopwatch
from tests import runs
from tests.helpers import TASK, XLA, built, mesh_of, random_batch, tiny_lm, tiny_moe
from tests.tolerances import assert_close


def looked_at(consumed, steps, **sizes):
    """A run that goes on from `consumed`, after so many steps of 20 targets each."""
    cfg = types.SimpleNamespace(nan_limit=10, **sizes)
    log = types.SimpleNamespace(advance=lambda: None)
    job = types.SimpleNamespace(cfg=cfg)
    run = Run(job, None, None, None, log, {}, 0, consumed)
    run.watch = Stopwatch()
    for step in range(steps):
        run._look(step, {"skipped_in_row": 0, "tokens": np.int32(20)}, False)
    return run


def test_tokens_are_counted_by_the_batches_and_lengths_that_were():
    """4 steps of 4 x 32, 2 of 8 x 32, 2 of 2 x 32, and 3 of 2 x 16 tokens."""
    consumed, found = Consumed(), []
    for steps, batch_size, seq_len in ((4, 4, 32), (2, 8, 32), (2, 2, 32), (3, 2, 16)):
        run = looked_at(consumed, steps, batch_size=batch_size, seq_len=seq_len)
        saved = json.loads(json.dumps(dataclasses.asdict(run.consumed)))
        consumed = Consumed.of(saved, seq_len)
        found.append(consumed.tokens)
    assert found == [512, 1024, 1152, 1248]
    assert consumed == Consumed(sequences=42, tokens=1248, targets=220)


@pytest.mark.slow
def test_a_run_counts_through_changes_of_its_batch(tmp_path):
    """As above; all tokens are targets."""
    workdir = tmp_path / "run"
    with runs.one_device():
        for steps, batch in ((4, 4), (6, 8), (8, 2)):
            sizes = (f"steps={steps}", f"batch_size={batch}", "eval.batch_size=4")
            runs.train(tmp_path, workdir, "eval.every=0", *sizes)
        data = runs.saved_state(tmp_path, workdir, *sizes)[2]
    found = {r["step"]: r for r in runs.records(workdir)}
    assert [found[step]["tokens_seen"] for step in (4, 6, 8)] == [512, 1024, 1152]
    assert [found[step]["targets_seen"] for step in (4, 6, 8)] == [512, 1024, 1152]
    assert {r["padding_frac"] for r in found.values()} == {0}
    assert data == {"sequences": 36, "tokens": 1152, "targets": 1152}
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "train":
            speeds = [line[f"perf/{name}_per_s"] for name in ("tokens", "targets")]
            assert speeds[0] == pytest.approx(speeds[1])


def test_an_old_checkpoint_has_sequences_alone():
    assert Consumed.of({"sequences": 40}, 32) == Consumed(40, 1280, 1280)
    saved = {"sequences": 40, "tokens": 512, "targets": 99}
    assert Consumed.of(saved, 32) == Consumed(40, 512, 99)


def test_speed_says_what_padding_has_of_it(monkeypatch):
    """Of 256 tokens 64 are padding and 96 are targets; a step takes half a second."""
    job = types.SimpleNamespace(cfg=types.SimpleNamespace(batch_size=4, seq_len=64))
    cost = types.SimpleNamespace(train_flops_at=lambda layers: 1e9)
    monkeypatch.setattr("moex.model.accounting.device_peak_flops", lambda: 1e12)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    found = speed(job, cost, {"padding": np.int32(64), "layers": {}}, 0.5, 96.0)
    assert found["perf/tokens_per_s"] == 512
    assert found["perf/targets_per_s"] == 192
    assert found["perf/mfu"] == pytest.approx(512 * 1e9 / 2e12)
    assert found["perf/mfu_without_padding"] == pytest.approx(384 * 1e9 / 2e12)


ROWS = 7
CFG = types.SimpleNamespace(task=TASK)
# Real tokens of each row, so that batches differ much in what they hold.
LENGTHS = np.array([16, 2, 11, 1, 16, 3, 5])


def held_out(**changes):
    """A job of seven sequences that are scored in batches of any size."""
    whole = random_batch(ROWS, 16, seed=3)
    kept = np.arange(16) < LENGTHS[:, None]
    whole |= {name: whole[name] * kept for name in ("segment", "loss_mask")}
    whole |= changes

    def job(batch_size):
        def batches(limit):
            rows = [{k: v[i] for k, v in whole.items()} for i in range(ROWS)]
            rows += [blank_example(16)] * (-ROWS % batch_size)
            for first in range(0, len(rows), batch_size):
                yield stack(rows[first : first + batch_size])

        data = types.SimpleNamespace(domains=("a", "b"))
        own = {"cfg": CFG, "mesh": mesh_of(1), "data": data}
        return types.SimpleNamespace(eval_batches=batches, **own)

    return whole, job


@pytest.fixture(scope="module")
def model():
    spec, params, state = built(tiny_lm(Segment(pattern=(tiny_moe(),), repeat=2)))
    step = jax.jit(make_eval_step(TASK, spec, num_domains=2, compute=XLA))
    return spec, {"params": params, "state": state}, step


@pytest.mark.thorough
def test_the_batch_of_an_evaluation_changes_no_figure(model):
    """The last batch of four holds one blank row, that of seventeen ten."""
    _, state, step = model
    _, job = held_out()
    whole = evaluate(job(ROWS), state, step, None)
    for batch_size in (4, 17):
        found = evaluate(job(batch_size), state, step, None)
        for name in ("nll", "perplexity", "bits_per_byte", "tokens", "bytes"):
            assert found[name] == pytest.approx(whole[name], rel=1e-6), name
        assert found["domains"] == pytest.approx(whole["domains"], rel=1e-6)
        for path, figures in whole["layers"].items():
            for name, value in figures.items():
                assert_close(found["layers"][path][name], value, "order", name)


def test_figures_of_an_evaluation_are_those_of_float64(model):
    """Router z-loss and balance by sequence, by a loop over tokens and sequences."""
    spec, state, step = model
    whole, job = held_out()
    ctx = TASK.context(whole, mode="eval", collect=True, compute=XLA)
    merged = spec.merge(state["params"], state["state"])
    aux = merged(ctx)[1]["segments"]["0"]["blocks"]["0"]["ffn"]
    (figures,) = evaluate(job(4), state, step, None)["layers"].values()
    for layer in range(2):
        logits_BLE = np.asarray(aux["scores"]["logits"][layer], np.float64)
        logits_BLE = logits_BLE.reshape(ROWS, 16, -1)
        chosen_BLK = np.asarray(aux["trace"]["expert"][layer]).reshape(ROWS, 16, -1)
        z, balance = [], []
        for row, length in enumerate(LENGTHS):
            logits_LE = logits_BLE[row, :length]
            sum_L = np.exp(logits_LE).sum(axis=1)
            z += list(np.log(sum_L) ** 2)
            count_E = np.bincount(chosen_BLK[row, :length].reshape(-1), minlength=8)
            prob_E = np.mean(np.exp(logits_LE) / sum_L[:, None], axis=0)
            balance.append(8 * np.sum(count_E / count_E.sum() * prob_E))
        assert_close(figures["router_z"][layer], np.mean(z), "float32")
        assert_close(figures["sequence_balance"][layer], np.mean(balance), "float32")


def test_counts_of_an_evaluation_are_exact_above_what_float32_holds(model):
    """Three batches of 2**30 + 1 bytes each."""
    job = types.SimpleNamespace(
        eval_batches=lambda limit: iter([{"x": np.zeros(1)}] * 3),
        cfg=CFG,
        mesh=mesh_of(1),
        data=types.SimpleNamespace(domains=("a",)),
    )
    sums = {"nll": jnp.float32(8), "z": jnp.float32(8), "layers": {}, "adapters": {}}
    sums |= {name: jnp.int32(2**30 + 1) for name in ("bytes", "tokens", "padding")}
    sums |= {"domain_score": jnp.ones(1), "domain_tokens": jnp.ones(1, jnp.int32)}
    state = {"params": None, "state": None}
    found = evaluate(job, state, lambda *_: sums, None)
    assert found["bytes"] == found["tokens"] == 3 * (2**30 + 1)
    assert found["nll"] == pytest.approx(24 / (3 * (2**30 + 1)))


def test_a_mean_over_no_target_is_no_figure(model):
    """It is not 0, which would be the best of all checkpoints."""
    _, state, step = model
    _, job = held_out(loss_mask=np.zeros((ROWS, 16), np.float32))
    found = evaluate(job(ROWS), state, step, None)
    assert (found["tokens"], found["bytes"], found["domains"]) == (0, 0, {})
    for name in ("nll", "perplexity", "bits_per_byte"):
        assert math.isnan(found[name])


def test_a_domain_without_tokens_has_no_loss(model):
    _, state, step = model
    found = evaluate(held_out(domain=np.ones(ROWS, np.int32))[1](ROWS), state, step, 0)
    assert list(found["domains"]) == ["b"]
    assert found["domains"]["b"] == pytest.approx(found["nll"], rel=1e-6)
