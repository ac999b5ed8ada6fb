"""Sums: files come back as they were written, and damaged ones are refused."""

import dataclasses

import numpy as np
import pytest

from moex.analysis.archive import write_archive
from moex.analysis.markers import Marker, MarkerFinder
from moex.analysis.sums import Sums
from moex.config.base import ConfigError
from tests.analysis.oracle import random_sums


def assert_same(actual: Sums, expected: Sums):
    for f in dataclasses.fields(Sums):
        if f.name not in ("layers", "by_domain"):
            assert getattr(actual, f.name) == getattr(expected, f.name), f.name
    parts = [(actual.layers, expected.layers)]
    assert list(actual.by_domain) == list(expected.by_domain)
    parts += [(actual.by_domain[d], own) for d, own in expected.by_domain.items()]
    for found, wanted in parts:
        assert list(found) == list(wanted)
        for label, own in wanted.items():
            for f in dataclasses.fields(own):
                values = getattr(found[label], f.name), getattr(own, f.name)
                np.testing.assert_array_equal(*values, err_msg=f"{label} {f.name}")


def test_sums_come_back_as_they_were_written(tmp_path):
    path, written = tmp_path / "a.npz", random_sums()
    written.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    read = Sums.read(path)
    assert_same(read, written)
    assert read.layers["002.1"].round == 1 and read.tokens == 50
    assert read.layers["002.2"].transitions_AB is None
    alone = dataclasses.replace(written, by_domain={})
    alone.save(tmp_path / "b.npz")
    assert_same(Sums.read(tmp_path / "b.npz"), alone)


def test_sums_of_a_domain_are_found_by_its_name():
    written = random_sums()
    assert written.of(None) is written.layers
    assert written.of("web") is written.by_domain["web"]
    with pytest.raises(ConfigError, match="Did you mean 'web'"):
        written.of("wab")
    none = dataclasses.replace(written, by_domain={})
    with pytest.raises(ConfigError, match="none: record them with --by-domain"):
        none.of("web")


def test_damaged_sums_are_one_line(tmp_path):
    def refused(match, **changes):
        path = tmp_path / "a.npz"
        random_sums().save(path)
        with np.load(path) as file:
            arrays = dict(file) | changes
        np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
        with pytest.raises(ConfigError, match=match) as error:
            Sums.read(path)
        assert str(error.value).startswith(str(path))

    refused("no array of numbers 'all/001/gram_EE'", **{"all/001/gram_EE": None})
    refused(r"must be \[4, 4\]", **{"all/001/gram_EE": np.ones((4, 3))})
    refused("not finite", **{"domain1/001/peu_E": np.full(4, np.nan)})
    refused("must be counts", **{"all/001/count_E": np.array([1, 2, -1, 0])})
    refused("must be counts", **{"all/001/count_E": np.array([1, 2, 0.5, 0])})
    refused("must be counts", **{"domain1/001/tokens": np.array(-1)})
    refused("not sums of moex", about=None)
    with pytest.raises(ConfigError, match="no such file"):
        Sums.read(tmp_path / "none.npz")
    write_archive(tmp_path / "b.npz", {"version": 2}, {})
    with pytest.raises(ConfigError, match="version = 2: must be 1"):
        Sums.read(tmp_path / "b.npz")


VOCABULARY = ("a", "b", "<", ">", "")


def test_markers_are_found_across_pieces_and_end_with_their_document():
    """Spans are strictly inside; one that is not closed ends with its document."""
    text = "ab<ab>a<b" + "ab>" + "<<a>"
    token_N = np.array([VOCABULARY.index(c) for c in text])
    document_N = np.repeat([0, 1, 2], [9, 3, 4])
    token, span = Marker("<"), Marker("<", ">")
    want = ["..<....<....<<..", "...ab...b.....a."]
    for cut in range(len(text) + 1):
        finder = MarkerFinder((token, span), VOCABULARY, "t")
        parts = [slice(0, cut), slice(cut, None)]
        pieces = [finder(token_N[p], document_N[p])[0] for p in parts]
        found_RN = np.concatenate(pieces, axis=1)
        for marked_N, row in zip(found_RN, want, strict=True):
            told = [c if m else "." for c, m in zip(text, marked_N, strict=True)]
            assert "".join(told) == row, cut


def test_what_stands_before_the_start_of_a_document_does_not_count():
    token_N = np.array([0, 2, 1, 3, 0, 1, 2, 1])
    document_N = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    for cut in range(9):
        finder = MarkerFinder([Marker("b")], VOCABULARY, "t", start="<")
        parts = [slice(0, cut), slice(cut, None)]
        pieces = [finder(token_N[p], document_N[p]) for p in parts]
        found_RN, counted_N = (
            np.concatenate(own, axis=-1) for own in zip(*pieces, strict=True)
        )
        assert np.flatnonzero(counted_N).tolist() == [1, 2, 3, 6, 7], cut
        assert np.flatnonzero(found_RN[0]).tolist() == [2, 7], cut


def test_a_marker_is_a_token_or_its_number():
    finder = MarkerFinder([Marker("#3")], VOCABULARY, "t")
    assert finder(np.array([3, 2]), np.zeros(2, int))[0].tolist() == [[True, False]]
    for text in ("", "c", "#5", "#x"):
        with pytest.raises(ConfigError, match="not one token of the vocabulary of t"):
            MarkerFinder([Marker(text)], VOCABULARY, "t")
    with pytest.raises(ConfigError, match="have no text"):
        MarkerFinder([Marker("a")], (), "t")
