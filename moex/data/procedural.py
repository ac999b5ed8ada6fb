"""Sources of generated text: word problems with solutions, copies, modular arithmetic.

Every machine has them. A document is a function of the seed and its number. Its key is
the core of the problem, such as the numbers of a word problem without names and things,
so that a problem and its like are never in both splits.
"""

import abc
import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator

from moex.config.base import require
from moex.data.contract import Document, Say, Source
from moex.data.files import File, content_key

ANSWER = "\nAnswer: "

NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack"),
    *("Kim", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Umar"),
    *("Vera", "Will", "Yara", "Zoe"),
)
THINGS = (
    *("apples", "books", "coins", "dolls", "eggs", "figs", "games", "hats", "jars"),
    *("keys", "lamps", "maps", "nuts", "oranges", "pens", "quilts", "rings", "shells"),
    *("stamps", "toys", "umbrellas", "vases", "whistles", "yo-yos"),
)
PLACES = ("market", "fair", "beach", "library", "garden", "station", "school", "museum")


@dataclasses.dataclass(kw_only=True, slots=True)
class Generated(Source, abc.ABC):
    """The base of sources that generate their documents."""

    count: int = 20_000  # documents, of both splits
    seed: int = 0  # another seed gives other documents

    def validate(self, path: str) -> None:
        """Check the fields."""
        Source.validate(self, path)
        require(self.count >= 1, f"{path}.count", self.count, "at least 1")

    def files(self, where: str, say: Say | None = None) -> list[File]:
        """This file: other code gives other documents."""
        return [File("procedural.py", pathlib.Path(__file__))]

    def read(self, where: str) -> Iterator[Document]:
        """Yield the documents in order."""
        for i in range(self.count):
            rng = random.Random(f"{type(self).__name__} {self.seed} {i}")
            core, text, answer = self.make(rng)
            yield Document(content_key(core.encode()), f"{text}{ANSWER}{answer}\n")

    @abc.abstractmethod
    def make(self, rng: random.Random) -> tuple[str, str, str]:
        """Make a document.

        Returns:
          The core of the problem, which makes its key; the text up to the answer, with
          what leads to it; and the answer.
        """


# A step of a word problem: from the amount at hand to (sentence, equation, new amount).
Step = Callable[[random.Random, str, str, int], tuple[str, str, int]]


def _buys(rng, name, thing, have):
    more = rng.randint(2, 40)
    place = rng.choice(PLACES)
    told = f"{name} buys {more} more {thing} at the {place}."
    return told, f"{have} + {more} = {have + more}", have + more


def _gives(rng, name, thing, have):
    less = rng.randint(1, have - 1)
    friend = rng.choice([n for n in NAMES if n != name])
    told = f"{name} gives {less} {thing} to {friend}."
    return told, f"{have} - {less} = {have - less}", have - less


def _loses_half(rng, name, thing, have):
    told = f"Half of the {thing} get lost."
    return told, f"{have} / 2 = {have // 2}", have // 2


def _gets_times(rng, name, thing, have):
    times = rng.choice((2, 3, 4))
    word = {2: "twice", 3: "three times", 4: "four times"}[times]
    told = f"Now {name} finds {word} as many {thing} as that, and keeps only these."
    return told, f"{times} * {have} = {times * have}", times * have


def _gets_boxes(rng, name, thing, have):
    boxes, each = rng.randint(2, 9), rng.randint(2, 12)
    told = f"{name} gets {boxes} boxes with {each} {thing} in each."
    total = have + boxes * each
    return told, f"{have} + {boxes} * {each} = {total}", total


def _shares(rng, name, thing, have):
    among = rng.choice([n for n in range(2, 10) if have % n == 0])
    told = f"{name} shares all {thing} among {among} friends, and looks at one share."
    return told, f"{have} / {among} = {have // among}", have // among


@dataclasses.dataclass(kw_only=True, slots=True)
class WordProblems(Generated):
    """Arithmetic word problems with worked solutions, such as those of GSM8K.

    The first amount, one to `steps` changes of it, a question, and one equation for
    each change.
    """

    steps: int = 4  # the most changes

    def validate(self, path: str) -> None:
        """Check the fields."""
        Generated.validate(self, path)
        require(1 <= self.steps <= 9, f"{path}.steps", self.steps, "in 1 to 9")

    def label(self) -> str:
        """The name of the domain."""
        return self.name or "word_problems"

    def make(self, rng: random.Random) -> tuple[str, str, str]:
        """Make a problem; its solution stands before the answer."""
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        have = rng.randint(3, 60)
        told, worked = [f"{name} has {have} {thing}."], []
        for _ in range(rng.randint(1, self.steps)):
            allowed: list[Step] = [_buys, _gets_boxes]
            allowed += [_gives] if have > 1 else []
            allowed += [_loses_half] if have % 2 == 0 and have > 2 else []
            allowed += [_gets_times] if have < 300 else []
            allowed += [_shares] if any(have % n == 0 for n in range(2, 10)) else []
            sentence, equation, have = rng.choice(allowed)(rng, name, thing, have)
            told.append(sentence)
            worked.append(equation)
        told.append(f"How many {thing} is that?")
        solution = ", ".join(worked)
        return solution, f"{' '.join(told)}\nSolution: {solution}.", str(have)


@dataclasses.dataclass(kw_only=True, slots=True)
class Copies(Generated):
    """Easy text: a short pattern of letters, again and again, and then once more."""

    def label(self) -> str:
        """The name of the domain."""
        return self.name or "copies"

    def make(self, rng: random.Random) -> tuple[str, str, str]:
        """Make a pattern that is repeated, and what comes next."""
        letters = "abcdefghijklmnopqrstuvwxyz"
        pattern = "".join(rng.choice(letters) for _ in range(rng.randint(3, 6)))
        return pattern, f"{pattern} " * rng.randint(6, 12), pattern


@dataclasses.dataclass(kw_only=True, slots=True)
class Modular(Generated):
    """Hard text: chains of sums and products modulo a prime, worked step by step."""

    modulus: int = 23  # numbers are below it, 2 to 997

    def validate(self, path: str) -> None:
        """Check the fields."""
        Generated.validate(self, path)
        require(2 <= self.modulus <= 997, f"{path}.modulus", self.modulus, "2 to 997")

    def label(self) -> str:
        """The name of the domain."""
        return self.name or "modular"

    def make(self, rng: random.Random) -> tuple[str, str, str]:
        """Make a chain of three to six steps; the answer is its last number."""
        at = rng.randrange(self.modulus)
        parts = [f"x = {at} mod {self.modulus};"]
        for _ in range(rng.randint(3, 6)):
            sign, by = rng.choice("+*"), rng.randrange(2, self.modulus)
            at = (at + by if sign == "+" else at * by) % self.modulus
            parts.append(f"x {sign} {by} -> {at};")
        text = " ".join(parts)
        return text, text, str(at)
