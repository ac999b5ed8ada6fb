"""A text is not the sum of its tokens' texts: what tokens add, in letters and bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moex.data import token_text
from moex.data.stream import _pairs
from tests.data import zoo

ANY = settings(derandomize=True, deadline=None, max_examples=40)
TEXT = st.text("the catsdr.xA\n \u4e2d\U0001f600é\u2581") | st.text()
EVERY = [*zoo.LOSSLESS, *zoo.OTHERS]
PREFIXED = ["bytes as fallback, prefix", "metaspace, first", "unigram"]


@pytest.fixture(scope="module")
def tokenizers():
    return zoo.make_all()


@pytest.mark.parametrize("name", EVERY)
def test_a_generated_text_goes_on_after_the_space(name, tokenizers):
    made = tokenizers[name]
    whole = made.prompt("the cat sees the red house")
    at = len(made.prompt("the cat"))
    if name.startswith("bytes as fallback"):  # one of its tokens has both words
        (new,) = made.encode_batch([" sees the red house"], inside=True)
    else:
        new = whole[at:]
    assert made.continued("the cat", new) == "the cat sees the red house"


@pytest.mark.parametrize("name", zoo.LOSSLESS)
@given(prompt=TEXT, seed=st.integers(0, 2**16), size=st.integers(0, 12))
@ANY
def test_a_generated_text_begins_with_its_prompt(name, prompt, seed, size, tokenizers):
    """Whatever ids come, bytes that are no character among them."""
    made = tokenizers[name]
    prompt = prompt.replace("\u2581", "")  # to such a tokenizer it is a space
    new = np.random.default_rng(seed).integers(0, made.vocab_size, size)
    text = made.continued(prompt, new)
    assert text.startswith(prompt)
    assert text == prompt + made.continuation(made.prompt(prompt), new)


@pytest.mark.parametrize("name", zoo.LOSSLESS)
@given(first=TEXT, second=TEXT)
@ANY
def test_a_text_inside_another_adds_itself(name, first, second, tokenizers):
    made = tokenizers[name]
    first, second = (t.replace("\u2581", "") for t in (first, second))
    (ids,) = made.encode_batch([second], inside=True)
    assert made.continued(first, ids) == first + second


@pytest.mark.parametrize("name", PREFIXED)
def test_a_response_is_no_new_word(name, tokenizers):
    """Encoded alone it would begin with a space that the data does not have."""
    made = tokenizers[name]
    cases = [("the ca", "t sees"), ("the cat", " sees"), ("", "the cat")]
    for pair, (ids, sizes, size, learned) in zip(
        cases, _pairs(cases, made, "s"), strict=True
    ):
        assert made.decode(ids) == "".join(pair)
        assert size == len("".join(pair)) == sizes.sum()
        assert sizes[learned:].sum() == len(pair[1])


def test_a_byte_that_is_no_character_leaves_those_before_it(tokenizers):
    made = tokenizers["bytes as fallback, prefix"]
    broken = next(i for i, b in made._byte_of.items() if b == 0xE4)
    ids = made.encode("x\u4e2d")
    assert len(ids) == 5  # a space, a letter, three bytes
    assert made.decode([*ids, broken]) == "x\u4e2d\ufffd"
    assert made.decode([*ids, broken, ids[1]]) == "x\u4e2d\ufffdx"
    assert made.continued("x\u4e2d", [broken, 0, ids[1]]) == "x\u4e2d\ufffdx"
    # The bytes of one character, over the border of two calls.
    assert made.continuation(ids[:3], ids[3:]) == "\u4e2d"


def test_a_prompt_stays_as_given_where_the_tokenizer_changes_it(tokenizers):
    made = tokenizers["word piece"]
    new = made.encode("sees")
    assert made.continued("The  Cat", new) == "The  Cat sees"
    assert made.continued("The  Cat ", new) == "The  Cat sees"
    assert made.continued("", new) == "sees"
    lower = tokenizers["byte level, lower case"]
    assert lower.continued("The Cat", lower.encode(" sees")) == "The Cat sees"


@pytest.mark.parametrize("name", EVERY)
@given(text=TEXT | st.sampled_from(zoo.SAMPLE), inside=st.booleans())
@ANY
def test_bytes_sum_to_the_size_of_a_text(name, text, inside, tokenizers):
    made = tokenizers[name]
    ((ids, sizes),) = made.encode_with_bytes([text], inside=inside)
    (same,) = made.encode_batch([text], inside=inside)
    assert ids.tolist() == same.tolist()
    assert len(ids) == len(sizes) and (sizes >= 0).all()
    assert sizes.sum() == (len(text.encode()) if len(ids) else 0)


@pytest.mark.parametrize("name", zoo.OTHERS)
@given(text=TEXT | st.sampled_from(zoo.SAMPLE))
@ANY
def test_bytes_of_given_ids_sum_to_their_text(name, text, tokenizers):
    made = tokenizers[name]
    ids = np.array(made.encode(text), np.int32)
    sizes = made.bytes_of(ids)
    assert (sizes >= 0).all() and len(sizes) == len(ids)
    assert sizes.sum() == len(made.decode(ids).encode())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("words", [3, 4, 5]),  # joined with spaces that no token has
        ("word piece", [3, 4, 3, 2]),  # the cat se ##es
        ("metaspace, first", [3, 4, 5]),  # no space before the first word
        ("suffixes", [3, 4, 5]),
        ("byte level, prefix", [4, 4, 5]),
    ],
)
def test_bytes_of_given_ids_by_hand(name, expected, tokenizers):
    made = tokenizers[name]
    ids = np.array(made.encode("the cat sees"), np.int32)
    assert made.bytes_of(ids).tolist() == expected


def test_bytes_with_sum_by_hand():
    sizes = np.array([2, 0, 3, 4], np.int32)
    sums = {12: [5, 0, 3, 4], 9: [2, 0, 3, 4], 8: [1, 0, 3, 4], 3: [0, 0, 0, 3]}
    for total, expected in sums.items():
        assert token_text.bytes_with_sum(sizes, total).tolist() == expected
    assert sizes.tolist() == [2, 0, 3, 4]


def test_pieces_keep_the_space_of_a_word(tokenizers):
    for name in ("metaspace, first", "unigram", "byte level"):
        assert " cat" in tokenizers[name].pieces()
