"""A small model of four domains, to be made smaller: 4 layers of 16 experts, 2 a token.

Every domain is an order-2 Markov source over 16 letters, with three random successors
of each pair; a text begins with the capital letter of its domain.
"""

import itertools
import pathlib

import numpy as np

from moex.configs import base
from moex.data.pipeline import Data
from moex.data.sources import Text
from moex.data.tokenizer import Bytes
from moex.model.optim import AdamW, Optim
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.stack import Segment
from moex.runs.keys import Checkpoint, Eval, Log, Loss
from moex.train.training import train

LETTERS, DOMAINS = "abcdefghijklmnop", "ABCD"
CHANCES = (0.75, 0.17, 0.08)
LENGTH = 48  # tokens of a text, the one that ends it too
TEXTS, HOLDOUT = 6500, 0.1  # of a domain
LAYERS, EXPERTS, WIDTH, BATCH, STEPS = 4, 16, 48, 24, 1000


def texts(rng, domain: str, count: int, next_CCS) -> list[str]:
    """Texts of a source; `next_CCS` are the successors of each pair of letters."""
    place_N = rng.integers(0, len(LETTERS), (count, 2))
    letters = [place_N[:, 0], place_N[:, 1]]
    for _ in range(LENGTH - 4):
        which = rng.choice(len(CHANCES), count, p=CHANCES)
        letters.append(next_CCS[letters[-2], letters[-1], which])
    return [domain + "".join(LETTERS[i] for i in row) for row in np.stack(letters, 1)]


def write_texts(folder: pathlib.Path, seed: int) -> list[pathlib.Path]:
    """The files of the domains; each text is a line."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for d, domain in enumerate(DOMAINS):
        rng = np.random.default_rng((seed, d))
        next_CCS = np.stack(
            [
                rng.choice(len(LETTERS), len(CHANCES), replace=False)
                for _ in itertools.product(LETTERS, LETTERS)
            ]
        ).reshape(len(LETTERS), len(LETTERS), -1)
        lines = texts(rng, domain, TEXTS, next_CCS)
        files.append(folder / f"{domain}.txt")
        files[-1].write_text("\n".join(lines), encoding="utf-8")
    return files


def config(files, seed: int):
    """The run config of the model."""
    cfg = base.get_config()
    moe = MoE(num_experts=EXPERTS, router=TopK(k=2), experts=Glu(hidden=WIDTH))
    cfg.model = LM(
        dim=WIDTH,
        attention=Attention(heads=4),
        layers=(Segment(pattern=(moe,), repeat=LAYERS),),
    )
    own = {"delimiter": "\n", "holdout": HOLDOUT}
    sources = tuple(Text(paths=(str(f),), name=f.stem, **own) for f in files)
    cfg.data = Data(sources=sources, tokenizer=Bytes())
    cfg.seed, cfg.steps, cfg.batch_size, cfg.seq_len = seed, STEPS, BATCH, LENGTH
    cfg.optim = Optim(rule=AdamW(), lr=3e-3, schedule="cosine", warmup_steps=100)
    cfg.loss = Loss(load_balance=0.01)
    cfg.eval = Eval(every=0, sequences=512)
    cfg.checkpoint = Checkpoint(every=0, keep=1, keep_best=0)
    cfg.log = Log(every=100, images_every=0, sample_tokens=0, tensorboard=False)
    return cfg


def trained(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """The run of a seed, trained if it is not there."""
    run = folder / f"seed{seed}"
    if not (run / "checkpoints").is_dir() or not any((run / "checkpoints").iterdir()):
        files = write_texts((folder / f"texts{seed}").absolute(), seed)
        train(config(files, seed), run)
    return run
