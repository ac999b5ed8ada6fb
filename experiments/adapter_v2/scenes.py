"""Sequences for the experiment: text, instructions with long answers, short captions.

Tokens are numbers below 64. All is made by fixed rules from a random number for each
sequence, so that nothing is read.

- text: a walk: each token is one of the two that may follow the one before.
- instruction: says which of the two it wants, and where the walk begins; the answer is
  that walk.
- caption: a walk of six tokens that always takes the first of the two. Where it begins
  is told by the visual vector of the sequence alone: features of a frozen random
  network of the number of one of 32 scenes, and noise.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from moex.adapters.v2 import AdapterV2, LayerRange, Prompts, VisualTokens
from moex.config.base import require
from moex.data.batches import Dataset, Datasets, Reading
from moex.nn.context import Context
from moex.tasks.base import Task
from moex.tasks.lm import LanguageModelling

VOCAB, SCENES, WIDTH = 64, 32, 16
HELD_OUT = 192  # sequences of each domain
KINDS = ("text", "instruction", "caption")
NAMED = {"text": 60, "instruction": 60, "caption": 63}  # first token of a sequence


@dataclasses.dataclass(kw_only=True, slots=True)
class Scenes(Reading):
    """Kinds of sequences and their shares."""

    kinds: tuple[tuple[str, float], ...] = ()  # (kind, weight), at least one

    def validate(self, path):
        Reading.validate(self, path)
        known = bool(self.kinds) and {kind for kind, _ in self.kinds} <= set(KINDS)
        require(known, f"{path}.kinds", self.kinds, f"some of {', '.join(KINDS)}")


class Made(Dataset):
    """Sequences of one kind; those of training and of evaluation differ."""

    def __init__(self, kind: str, split: int, length: int, domain: int, visual: bool):
        size = HELD_OUT if split else 2**20
        super().__init__(size, domain)
        self.kind, self.split, self.seq_len, self.visual = kind, split, length, visual
        fixed = np.random.default_rng(0)
        self.follow = fixed.integers(0, 60, (60, 2))
        self.begins = fixed.permutation(60)[:SCENES]
        self.encoder = fixed.normal(size=(SCENES, WIDTH))

    def sequence(self, index):
        random = np.random.default_rng([KINDS.index(self.kind), self.split, index])
        tokens, features = [NAMED[self.kind]], np.zeros((1, WIDTH))
        if self.kind == "text":
            tokens.append(int(random.integers(60)))
            first, choices = 0, random.integers(2, size=self.seq_len - 1)
        elif self.kind == "instruction":
            wanted = int(random.integers(2))
            tokens += [61 + wanted, int(random.integers(60))]
            first, choices = len(tokens) - 1, [wanted] * (self.seq_len - 2)
        else:
            scene = int(random.integers(SCENES))
            tokens.append(int(self.begins[scene]))
            first, choices = 0, [0] * 5
            features = np.tanh(self.encoder[scene])[None]
            features = features + 0.3 * random.normal(size=features.shape)
        for choice in choices:
            tokens.append(int(self.follow[tokens[-1], choice]))
        n, L = min(len(tokens) - 1, self.seq_len), self.seq_len
        place, real = np.arange(L), np.arange(L) < n
        row = np.zeros(L + 1, np.int32)
        row[: n + 1] = tokens[: n + 1]
        made: dict[str, Any] = {
            "tokens": np.where(real, row[:-1], 0).astype(np.int32),
            "targets": np.where(real, row[1:], 0).astype(np.int32),
            "num_bytes": real.astype(np.int32),
            "segment": real.astype(np.int32),
            "position": np.where(real, place, 0).astype(np.int32),
            "loss_mask": (real & (place >= first)).astype(np.float32),
        }
        if self.visual:
            made["visual"] = features.astype(np.float32)
            made["has_visual"] = np.int32(self.kind == "caption")
        return made


@dataclasses.dataclass(kw_only=True, slots=True)
class SceneModelling(LanguageModelling):
    """Language modelling of `Scenes`, which needs no tokenizer."""

    DATA = Scenes
    like, given, resumed = Task.like, Task.given, Task.resumed
    save, opened, identity = Task.save, Task.opened, Task.identity
    saved_identity, check_same = Task.saved_identity, Task.check_same
    use_lines = Task.use_lines

    def prepare(self, cfg, *, log=print, scoring=False):
        names = tuple(kind for kind, _ in cfg.data.kinds)
        visual = bool(cfg.model.adapter and cfg.model.adapter.fields())
        splits = [
            [Made(k, s, cfg.seq_len, i, visual) for i, k in enumerate(names)]
            for s in (0, 1)
        ]
        return Datasets(
            config=cfg.data,
            train=splits[0],
            eval=splits[1],
            weights=tuple(weight for _, weight in cfg.data.kinds),
            domains=names,
            manifest={name: {"sha256": name, "files": []} for name in names},
        )

    def num_domains(self, cfg):
        return len(cfg.data.kinds)

    def fill(self, cfg, data=None):
        cfg.model.vocab = VOCAB


@dataclasses.dataclass(kw_only=True, slots=True)
class LateFusion(AdapterV2):
    """The first version: the visual vector is added to the prompts of late layers."""

    def keys_adapters(self, cfg, rngs, path):
        place = LayerRange.of(cfg, cfg.num_layers() - self.layers, self.layers, path)
        return {"prompts": LatePrompts(place, self, rngs)}


class LatePrompts(Prompts):
    """Prompts plus the projected visual vector, where a sequence has one."""

    def __init__(self, place, cfg: LateFusion, rngs):
        Prompts.__init__(self, place, cfg.prompt_length, rngs)
        self.visual = VisualTokens(place, cfg.visual, rngs)

    def keys(self, ctx: Context):
        prompts, visual = Prompts.keys(self, ctx), self.visual.keys(ctx)
        has_B = jnp.asarray(ctx.has_visual_B > 0, visual.x_YBPD.dtype)
        x_YBPD = prompts.x_YBPD + has_B[None, :, None, None] * visual.x_YBPD
        return self.place.keys(x_YBPD, prompts.gate_YBH)
