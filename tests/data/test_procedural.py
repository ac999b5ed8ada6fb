"""Generated text: every answer is right, and no problem is in both splits."""

import re

import pytest

from moex import Copies, Modular, WordProblems
from moex.config.base import ConfigError, check
from moex.data.procedural import ANSWER

SOURCES = (WordProblems, Copies, Modular)


@pytest.mark.parametrize("kind", SOURCES)
def test_documents_are_a_function_of_the_seed(kind):
    one, again = list(kind(count=40).read("")), list(kind(count=60).read(""))
    assert one == again[:40]
    other = list(kind(count=40, seed=1).read(""))
    assert len({d.value for d in one} & {d.value for d in other}) < 5


@pytest.mark.parametrize("kind", SOURCES)
def test_no_core_of_a_problem_is_in_both_splits(kind):
    source = kind(count=3000, holdout=0.2)
    cores = {"train": set(), "eval": set()}
    for split, own in cores.items():
        for document in source.documents(split):
            text, answer = document.value.split(ANSWER)
            if kind is WordProblems:
                own.add(text.split("Solution: ")[1])
            else:
                own.add(answer if kind is Copies else text)
    assert cores["train"] and cores["eval"]
    assert not cores["train"] & cores["eval"]


def test_solutions_of_word_problems_are_right():
    for document in WordProblems(count=2000, steps=5).read(""):
        question, rest = document.value.split("\nSolution: ")
        solution, answer = rest.strip().removesuffix("\n").split(f".{ANSWER}")
        at = int(re.match(r"\w+ has (\d+) ", question)[1])
        equations = solution.split(", ")
        assert 1 <= len(equations) <= 5
        for equation in equations:
            left, right = equation.split(" = ")
            assert str(at) in left.split()
            assert "/" not in left or eval(left) == int(eval(left))
            assert eval(left) == int(right) > 0
            at = int(right)
        assert at == int(answer)


def test_chains_modulo_a_prime_are_right():
    for document in Modular(count=500, modulus=11).read(""):
        text, answer = document.value.strip().split(ANSWER)
        start, *steps = text.rstrip(";").split("; ")
        at = int(re.match(r"x = (\d+) mod 11", start)[1])
        for step in steps:
            sign, by, to = re.match(r"x (.) (\d+) -> (\d+)", step).groups()
            at = (at + int(by) if sign == "+" else at * int(by)) % 11
            assert at == int(to)
        assert at == int(answer)


def test_copies_repeat_one_pattern():
    for document in Copies(count=200).read(""):
        text, answer = document.value.strip().split(f" {ANSWER}")
        assert set(text.split()) == {answer}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (WordProblems(count=0), "source.count = 0: must be at least 1"),
        (WordProblems(steps=10), "source.steps = 10: must be in 1 to 9"),
        (Modular(modulus=1), "source.modulus = 1"),
    ],
)
def test_sizes_that_are_wrong(source, told):
    with pytest.raises(ConfigError, match=told):
        check(source, "source")
