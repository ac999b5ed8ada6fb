"""The experts of every token of a trace, as arrays in the order of decoding.

N tokens · R routers: MoE layers, and each round of a chain · L layers with routers
K slots per token, the most of a layer · E experts, the most of a layer
T tokens, some of the trace
"""

import dataclasses

import numpy as np

from moex.analysis.trace import Trace
from moex.config.base import ConfigError, require

WINDOW = 16  # tokens whose distinct experts are the demand of a layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routes:
    """Where tokens went; an example is one sequence, and its tokens lie together.

    Attributes:
      expert_NRK: int32; -1: a slot without an expert that computes.
      prob_NRK: float32 normalised score of each; 0 where there is no expert.
      logits_NRE: float32 logits of all experts, if the trace has them and they were
        asked for; -inf for experts that a layer does not have.
      layer_R: the layer of each router, counted among those with routers: rounds of a
        chain share one.
      experts_R: experts that compute, of each router.
      example_N: from 0 upwards.
      index_N: the place of a token in its example, from 0.
      document_N: documents of the trace; one example may have several.
      token_N: ids of tokens.
    """

    expert_NRK: np.ndarray
    prob_NRK: np.ndarray
    logits_NRE: np.ndarray | None
    layer_R: tuple[int, ...]
    experts_R: tuple[int, ...]
    example_N: np.ndarray
    index_N: np.ndarray
    document_N: np.ndarray
    token_N: np.ndarray

    def __len__(self) -> int:
        return len(self.token_N)

    @property
    def num_layers(self) -> int:
        """L."""
        return max(self.layer_R) + 1

    @property
    def num_experts(self) -> int:
        """E."""
        return max(self.experts_R)

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return int(self.example_N[-1]) + 1 if len(self) else 0

    def experts_of(self, rows, router: int) -> tuple[np.ndarray, np.ndarray]:
        """The experts of some tokens, ascending, and the rows of each."""
        ids = self.expert_NRK[rows, router]
        return np.unique(ids[ids >= 0], return_counts=True)

    def scores_of(self, rows, router: int) -> np.ndarray:
        """Normalised scores of all experts, float[E], the mean over some tokens.

        Without the logits of all experts it knows only those of the chosen ones.
        """
        if self.logits_NRE is not None:
            logits_TE = self.logits_NRE[rows, router].astype(np.float64)
            exp_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
            return (exp_TE / exp_TE.sum(1, keepdims=True)).mean(0)
        ids, probs = self.expert_NRK[rows, router], self.prob_NRK[rows, router]
        here = ids >= 0
        weights = probs[here].astype(np.float64)
        return np.bincount(ids[here], weights, self.num_experts) / max(len(rows), 1)

    def patterns(self, rows) -> np.ndarray:
        """The experts that each of some tokens needs in every layer, bool[T, L, E]."""
        ids_TRK = self.expert_NRK[rows]
        shape = len(ids_TRK), self.num_layers, self.num_experts
        found_TLE = np.zeros(shape, bool)
        t, r, k = np.nonzero(ids_TRK >= 0)
        found_TLE[t, np.asarray(self.layer_R)[r], ids_TRK[t, r, k]] = True
        return found_TLE

    def counts(self) -> np.ndarray:
        """How often each expert was chosen, int64[L, E]."""
        found_LE = np.zeros((self.num_layers, self.num_experts), np.int64)
        for router, layer in enumerate(self.layer_R):
            ids = self.expert_NRK[:, router]
            found_LE[layer] += np.bincount(ids[ids >= 0], minlength=self.num_experts)
        return found_LE

    def demand(self) -> np.ndarray:
        """The mean number of distinct experts of each layer in a window, float[L]."""
        parts = np.split(np.arange(len(self)), range(WINDOW, len(self), WINDOW))
        return np.mean([self.patterns(p).any(0).sum(1) for p in parts], axis=0)

    def tokens(self, here_N) -> "Routes":
        """The part that has some tokens, bool[N]; examples are numbered anew."""
        arrays = {
            f.name: getattr(self, f.name)[here_N]
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), np.ndarray)
        }
        numbers = np.unique(arrays["example_N"], return_inverse=True)[1]
        arrays["example_N"] = numbers.astype(np.int32)
        return dataclasses.replace(self, **arrays)

    def examples(self, first: int, end: int) -> "Routes":
        """The part that has examples `first` to `end`, without `end`."""
        return self.tokens((first <= self.example_N) & (self.example_N < end))

    def halves(self) -> tuple["Routes", "Routes"]:
        """The first half of the examples, to learn from, and the others."""
        middle = self.num_examples // 2
        return self.examples(0, middle), self.examples(middle, self.num_examples)


def read_routes(trace: Trace, *, tokens: int | None = None, logits=False) -> Routes:
    """Read the routes of a trace.

    Args:
      trace: open.
      tokens: the most tokens, rounded down to whole examples, at least one; None: all.
      logits: read the logits of all experts too.

    Raises:
      ConfigError: if the trace has no token, or routers that look at later tokens, so
        that no text can be written with them.
    """
    infos = list(trace.layers.values())
    for info in infos:
        if not info.causal:
            raise ConfigError(
                f"{trace.path}: layer {info.label} ({info.router}) chooses by later "
                "tokens too; its experts cannot be replayed token by token."
            )
    require(tokens is None or tokens >= 1, "tokens", tokens, "1 or more")
    slots, most = max(i.slots for i in infos), max(i.num_experts for i in infos)
    parts: list[dict[str, np.ndarray]] = []
    found = 0
    for chunk in trace.chunks(values=("prob",), logits=logits):
        names = ("example_N", "document_N", "token_N")
        part = {name: getattr(chunk.tokens, name) for name in names}
        shape = len(chunk.tokens), len(infos)
        part["expert_NRK"] = np.full((*shape, slots), -1, np.int32)
        part["prob_NRK"] = np.zeros((*shape, slots), np.float32)
        if logits:
            part["logits_NRE"] = np.full((*shape, most), -np.inf, np.float32)
        for r, info in enumerate(infos):
            own = chunk.layers[info.label]
            assert own.prob_NK is not None
            # Experts from num_experts on compute nothing.
            here_NK = own.keep_NK & (own.expert_NK < info.num_experts)
            part["expert_NRK"][:, r, : info.slots][here_NK] = own.expert_NK[here_NK]
            part["prob_NRK"][:, r, : info.slots][here_NK] = own.prob_NK[here_NK]
            if logits:
                assert own.logits_NE is not None
                own_NE = own.logits_NE[:, : info.num_experts]
                part["logits_NRE"][:, r, : info.num_experts] = own_NE
        parts.append(part)
        found += len(chunk.tokens)
        if tokens is not None and found > tokens:
            break
    arrays = {
        name: np.concatenate([p[name] for p in parts])
        for name in (parts[0] if parts else ())
    }
    if not found:
        raise ConfigError(f"{trace.path}: has no token.")
    if "logits_NRE" in arrays and np.isnan(arrays["logits_NRE"]).any():
        raise ConfigError(f"{trace.path}: logits of a router are NaN.")
    starts = np.flatnonzero(np.diff(arrays["example_N"], prepend=-1))
    lengths = np.diff([*starts, found])
    arrays["example_N"] = np.repeat(np.arange(len(starts), dtype=np.int32), lengths)
    index_N = np.arange(found) - np.repeat(starts, lengths)
    numbers = sorted({info.layer for info in infos})
    routes = Routes(
        logits_NRE=arrays.pop("logits_NRE", None),
        **arrays,
        index_N=index_N.astype(np.int32),
        layer_R=tuple(numbers.index(info.layer) for info in infos),
        experts_R=tuple(info.num_experts for info in infos),
    )
    if tokens is None or found <= tokens:
        return routes
    whole = int(np.searchsorted(np.cumsum(lengths), tokens, side="right"))
    return routes.examples(0, max(1, whole))


def in_step(routes: Routes, batch: int = 1) -> list[np.ndarray]:
    """The rows of each decoding step: `batch` examples go on together, in their order.

    An example that has ended is no more among them; the last batch may be smaller.
    """
    require(batch >= 1, "batch", batch, "1 or more")
    group_N = routes.example_N // batch
    order = np.lexsort((routes.example_N, routes.index_N, group_N))
    key = np.stack([group_N, routes.index_N])[:, order]
    starts = np.flatnonzero((np.diff(key, axis=1) != 0).any(0)) + 1
    return np.split(order, starts)
