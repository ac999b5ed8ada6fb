"""Every command that README, docs and help print is right as it stands."""

import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from moex.config.flags import load_config
from moex.data.sources import Parquet
from moex.runs.keys import check_run
from tests import printed, runs
from tests.interop import parity
from tests.printed import Printed

EVERYTHING = printed.everything()
# Commands that are right where they stand and cannot be read here.
ELSEWHERE = {
    "moex convert --to=fewer --stay=2": "a kind of conversion that the page makes",
}


def test_every_printed_command_is_read_without_an_error():
    found = [
        f"{command}\n    {wrong}"
        for command in EVERYTHING
        if command.text not in ELSEWHERE and (wrong := printed.wrong(command))
    ]
    assert not found, "\n".join(["", *found])


def test_what_is_excepted_is_still_printed():
    texts = {command.text for command in EVERYTHING}
    assert texts >= ELSEWHERE.keys()


@pytest.mark.parametrize(
    "text, message",
    [
        ("moex trian --config=configs/quickstart.py", "no verb trian"),
        ("moex train --config=configs/quickstart.py --wrokdir=r", "--wrokdir"),
        ("moex train --config=configs/quickstart.py --config.stepz=3", "'steps'"),
        ("moex train --config=configs/moe_1b.py:data=stdlib --config.steps=0", "steps"),
        ("moex eval runs/a --config.optim.lr=fast", "optim.lr"),
        ("moex generate runs/a --config.steps=3", "no --config"),
        ("moex compare", "required"),
        ("moex train --config=... --workdir=runs/a", "cut short"),
        ("moex params --config=quikstart", "quikstart"),
        ("moex plan --config=configs/nowhere.py --topology=v5e:1x1", "nowhere"),
        ("python -m benchmarks.nothing", "no module"),
        ("python -m benchmarks.trace --tokenz=3", "--tokenz"),
        ("python -m launch.local -- --config.stepz=1", "'steps'"),
        ("make tain", "tain"),
        ("pip install -e '.[gpu]'", "gpu"),
    ],
)
def test_a_wrong_command_is_seen(text, message):
    assert message in printed.wrong(Printed("a page", text))


def test_commands_are_found_where_they_stand():
    page = """
Text with `moex train --config=FILE`, `moex
eval RUN`, `moex.cli` and `a` name.

    moex train --config=a.py \\
        --workdir=b   # a comment
    A=1 moex eval b

```
moex: error: nothing
moex is a word of this output
```

```python
moex = 1
```

- a list

  ```sh
  moex params
  ```
"""
    found = [(c.text, c.whole) for c in printed.of_page("page", page)]
    assert found == [
        ("moex train --config=FILE", False),
        ("moex eval RUN", False),
        ("moex train --config=a.py --workdir=b   # a comment", True),
        ("A=1 moex eval b", True),
        ("moex params", True),
    ]


# Running them.

# Pages whose commands take hours, or are for who works on moex itself.
FOR_DEVELOPERS = ("CONTRIBUTING", "benchmarks/", "experiments/", "launch/")
# What is not run, by a part of the command, and why.
NEEDS = {
    "make ": "makes an environment with the network",
    "source ": "an environment",
    "sbatch ": "Slurm",
    "--distributed": "several hosts",
    "--compile": "the extra aot",
    "--tasks": "the extra eval",
    "moex experiment run": "an hour; tests/experiment runs a small one",
    "my_idea.py": "a config that the reader writes",
    "--ladder": "runs of four sizes, which tests/analysis/test_judging.py has",
    "--visual": "a run with visual tokens, which tests/data/test_visual.py has",
}
# Every training is short.
SHORT = (
    *("steps=4", "batch_size=8", "optim.warmup_steps=0"),
    *("eval.sequences=4", "eval.batch_size=32", "log.sample_tokens=4"),
    "log.compressors=False",
)
SHORTER = {
    "--sweep seed=0,1,2": "--sweep seed=0",
    "--profile=20:25": "--profile=1:3",
    "--step=500": "--step=4",
    "--tokens=100000": "--tokens=1000",
    "PruneRows(keep=0.1)": "PruneRows(keep=0.1, warmup=0)",
}
# What a reader would put for a word.
STANDS = {"RUN": "runs/dense"} | {
    word: f"runs/{word.lower()}" for word in ("NEW", "TUNED", "LOW", "PRUNED", "SMALL")
}
# What a page takes for granted, with the command that makes it.
TRAIN = "moex train --config=configs/quickstart.py"
TUNE = (
    "moex train --config=runs/olmoe --config.init_from=runs/olmoe --data=chats.jsonl "
    '--config.model.adapter=\'LoRA(rank=2, alpha=4, targets=("attention", '
    '"experts"))\''
)
GIVEN = {
    "runs/quickstart": f"{TRAIN} --workdir=runs/quickstart",
    "runs/first": f"{TRAIN} --workdir=runs/first",
    "runs/again": f"{TRAIN} --workdir=runs/again",
    "runs/k4": f"{TRAIN} --workdir=runs/k4 --config.seed=1",
    "runs/sweep": f"{TRAIN} --workdir=runs/sweep --sweep seed=0,1",
    "runs/base": f"{TRAIN} --workdir=runs/base",
    "runs/moe": f"{TRAIN} --workdir=runs/moe "
    "--config.model.layers.0.pattern.0.num_experts=16",
    "runs/small": f"{TRAIN} --workdir=runs/small",
    "runs/full": f"{TRAIN} --workdir=runs/full",
    "runs/mixed": f"{TRAIN} --data=code --data=web.txt --workdir=runs/mixed "
    "--config.model.layers.0.pattern.0.num_experts=16",
    "sums.npz": "moex trace runs/mixed --out sums.npz --sums-only --by-domain",
    "runs/dense": f"{TRAIN}:ffn=dense --workdir=runs/dense",
    "runs/parquet": "moex train --config=parquet.py --workdir=runs/parquet",
    "runs/olmoe": "moex import-hf models/OLMoE-1B-7B --out runs/olmoe",
    "runs/lora": f"{TUNE} --workdir=runs/lora",
    "runs/chat": f"{TUNE} --workdir=runs/chat",
    "models/code-lora": "moex export-hf runs/lora --adapter --out models/code-lora",
    "runs/new": "moex convert runs/quickstart --to=latent --group=8 --latent=64 "
    "--workdir=runs/new",
    "trace.parquet": "moex trace runs/moe --out trace.parquet",
    "later.parquet": "moex trace runs/moe --out later.parquet",
}
# The folder in which the commands of a page are given.
FIRST = {"configs/template/README.md": ("moex init mine", "cd mine")}
TARGETS = re.compile(r"--(?:workdir|out)[= ]\S+")


def pages() -> dict[str, list[Printed]]:
    """The whole commands of the pages for users that can be run here, by page."""
    found: dict[str, list[Printed]] = {}
    for command in EVERYTHING:
        ours = not command.page.startswith(FOR_DEVELOPERS)
        if command.whole and ours and not any(n in command.text for n in NEEDS):
            found.setdefault(command.page, []).append(command)
    return found


class Reader:
    """Somebody who copies the commands of a page into a shell, in a new folder."""

    def __init__(self, folder: pathlib.Path, base: "Reader | None" = None):
        self.folder, self.base = folder, base or self
        folder.mkdir()
        (folder / "configs").symlink_to(runs.ROOT / "configs")
        shutil.copytree(parity.FIXTURES / "olmoe", folder / "models" / "OLMoE-1B-7B")
        self.write_data()

    def write_data(self) -> None:
        """The files of their own that pages speak of."""
        for name in ("web.txt", "book.txt", "task2.txt"):
            runs.write_corpus(self.folder / name)
        turns = (("user", "who sees?"), ("assistant", "the cat sees"))
        chat = {"messages": [{"role": r, "content": text} for r, text in turns]}
        lines = "".join(json.dumps(chat | {"id": i}) + "\n" for i in range(200))
        (self.folder / "chats.jsonl").write_text(lines, encoding="utf-8")
        costs = {"device": 2e-5, "move": 4e-4, "cpu_row": 9e-5}
        (self.folder / "costs.json").write_text(json.dumps(costs), encoding="utf-8")
        (self.folder / "code").mkdir()
        shutil.copy(printed.__file__, self.folder / "code" / "a.py")
        draws = random.Random(0)
        rows = [f"{i},{draws.random()},{draws.random()}" for i in range(24 * 60)]
        for name in ("series.csv", "other.csv"):
            lines = ["date,a,b", *rows]
            (self.folder / name).write_text("\n".join(lines), encoding="utf-8")
        texts = (self.folder / "web.txt").read_text(encoding="utf-8").split("\n\n")
        for name in ("a", "b"):
            table = pyarrow.table({"text": texts, "body": texts})
            pyarrow.parquet.write_table(table, self.folder / f"{name}.parquet")
        (self.folder / "my_config.py").write_text(
            "from moex.configs import quickstart\n\n\ndef get_config(arg=''):\n"
            "    cfg = quickstart.get_config(arg)\n    cfg.seed = 1\n    return cfg\n",
            encoding="utf-8",
        )
        text = runs.CONFIG.replace("import Text", "import Parquet")
        text = re.sub(
            r"Text\(.*0\.1\)", 'Parquet(paths=("a.parquet",), holdout=0.1)', text
        )
        (self.folder / "parquet.py").write_text(text, encoding="utf-8")
        (self.folder / "experiments").symlink_to(runs.ROOT / "experiments")

    def run(self, text: str) -> None:
        """Run a command line, once all that it needs is there."""
        if text.startswith("cd "):
            self.folder /= text.split()[1]
            return
        for word, value in STANDS.items():
            text = re.sub(rf"\b{word}\b", value, text)
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        text = text.partition("  #")[0]
        for target in re.findall(r"moex convert .*--workdir=(\S+)", text):
            shutil.rmtree(self.folder / target, ignore_errors=True)
        self.give_all(text)
        if text.startswith(("moex train", "python -m launch.local")):
            text += "".join(f" --config.{field}" for field in SHORT)
        if text.startswith("tensorboard"):  # it serves until it is ended
            text = f"timeout 20 {text} --port=0 || test $? = 124"
        done = subprocess.run(
            ["timeout", "900", "bash", "-euc", text],  # ends its children too
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
        )
        told = f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, told

    def give_all(self, text: str) -> None:
        """Have what a command takes for granted."""
        needed = TARGETS.sub("", text)
        for name in GIVEN:
            if re.search(rf"[ =\"]{name}\b", needed):
                self.give(name)

    def give(self, name: str) -> None:
        """Have what a page takes for granted; it is made once for all pages."""
        if (self.folder / name).exists():
            return
        if self.base is self:
            self.run(GIVEN[name])
            return
        self.give_all(GIVEN[name])  # a run with adapters needs its base beside it
        self.base.give(name)
        made, copy = self.base.folder / name, self.folder / name
        copy.parent.mkdir(exist_ok=True)
        (shutil.copytree if made.is_dir() else shutil.copy)(made, copy)

    def environment(self) -> dict:
        """With `moex` and `python` on the PATH, and a home of its own."""
        home = self.base.folder.with_name("home")
        if not home.exists():
            (home / "bin").mkdir(parents=True)
            for name, args in {"moex": "-m moex.cli", "python": ""}.items():
                script = home / "bin" / name
                script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {args} "$@"\n')
                script.chmod(0o755)
        path = os.pathsep.join([str(home / "bin"), os.environ["PATH"]])
        mine = {"PATH": path, "HOME": str(home), "MOEX_CACHE": str(home / "cache")}
        kept = runs.environment(**mine)
        return {k: v for k, v in kept.items() if not k.startswith("JAX_COMPILATION")}


def test_the_config_file_of_a_reader_is_good(tmp_path):
    folder = Reader(tmp_path / "reader").folder
    cfg = load_config([f"--config={folder / 'parquet.py'}"])
    check_run(cfg)
    assert isinstance(cfg.data.sources[0], Parquet)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What pages take for granted is made here."""
    return Reader(tmp_path_factory.mktemp("printed") / "base")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages())
def test_the_commands_of_a_page_run(page, base, tmp_path):
    reader = Reader(tmp_path / "reader", base)
    for text in (*FIRST.get(page, ()), *(c.text for c in pages()[page])):
        reader.run(text)
