"""Tasks of the `lm_eval` harness on a run: multiple choice, perplexity, generation.

Scoring itself is in `likelihood.py` and knows nothing of the harness.
"""

import collections
import contextlib
import os
import pathlib
import sys
import zlib
from itertools import chain

import jax

from moex import hints
from moex.config.base import ConfigError, nearest, require
from moex.json_files import dump_json
from moex.model.decode import generate
from moex.model.steering import Steering
from moex.nn.contract import not_causal
from moex.progress import tell
from moex.runs.directory import Place, RunDir
from moex.runs.open import LoadedRun, load_run
from moex.runs.program import eval_batch_size
from moex.runs.score import steering_for
from moex.runs.weights import load_lowered
from moex.serve.likelihood import chunks, continuation_scores, padded_length
from moex.tasks.base import require_token_ids

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # `_need_harness` reports it when a user asks for a task
    TemplateLM = object

MAX_NEW_TOKENS = 256  # the default if a task names no limit, as in the harness itself
BOOTSTRAP = 1000  # draws for the standard errors of figures that are not means
# The keys that a task may have in `generation_kwargs`.
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class HarnessLM(TemplateLM):
    """A run as a model of the harness.

    Every text starts with the begin token of the run's tokenizer, if it has one: the
    document token, as in training, or the begin token of an imported model. A context
    that is too long is cut from the left, and then loses this token.

    Args:
      run: the result of `load_run`.
      steer: `Context.steer`; None: as trained.

    Raises:
      ConfigError: without the package `lm_eval`, or if the model looks at later tokens.
    """

    def __init__(self, run: LoadedRun, steer: dict | None = None):
        _need_harness()
        where = not_causal(run.cfg.model)
        if where is not None:
            raise ConfigError(
                f"{where}: tokens are chosen by those that follow; no score is fair."
            )
        super().__init__()
        self.run, self.steer = run, steer

    @property
    def eot_token_id(self) -> int:
        return self.run.tokenizer.doc_id

    @property
    def prefix_token_id(self) -> int:
        return self.run.tokenizer.prefix_id

    @property
    def max_length(self) -> int:
        return self.run.cfg.seq_len

    def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
        ids = self.run.tokenizer.encode(string)
        first = self.run.tokenizer.begin_id
        return ids if add_special_tokens is False or first is None else [first, *ids]

    def _encode_pair(self, context, continuation):
        before, after = super()._encode_pair(context, continuation)
        if not after:  # the last token of the context covers the continuation too
            (ids,) = self.run.tokenizer.encode_batch([continuation], inside=True)
            after = ids.tolist()
        return before or [self.prefix_token_id], after  # empty if the context is spaces

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """Score (texts, context, continuation) of any length; `continuation_scores`."""
        pieces = [self._windows(before, after) for _, before, after in requests]
        pairs = [*chain.from_iterable(pieces)]
        scores = iter(continuation_scores(self.run, pairs, self.steer))
        own = [[next(scores) for _ in some] for some in pieces]
        return [(sum(s for s, _ in some), all(g for _, g in some)) for some in own]

    def _windows(self, context, continuation):
        """Pairs that score a continuation: several if it is longer than seq_len."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        if len(continuation) <= self.max_length:
            return [(context, continuation)]
        windows = get_rolling_token_windows(
            continuation, context[-1], self.max_length, context_len=1
        )
        return list(map(make_disjoint_window, windows))

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        texts = [self.tok_encode(r.args[0], False) for r in requests]
        whole = [(None, [self.prefix_token_id], text) for text in texts]
        return [total for total, _ in self._loglikelihood_tokens(whole)]

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """Generate greedily, or if a task has a temperature, one prompt at a time.

        The random seed depends on the context and on how often it was asked before.
        """
        run = self.run
        asked: collections.Counter = collections.Counter()
        groups = collections.defaultdict(list)
        for i, (context, options) in enumerate(r.args for r in requests):
            until, arguments = self._generation(options)
            room = self.max_length - arguments["max_new_tokens"]
            prompt = run.tokenizer.prompt(context)[-room:]
            if arguments["temperature"] > 0:
                text = f"{asked[context]} {context}"
                arguments["seed"] = zlib.crc32(text.encode()) >> 1
                asked[context] += 1
            length = padded_length(len(prompt), self.max_length)
            groups[length, tuple(arguments.items())].append((i, prompt, until))
        compute = run.compute(train=False)
        texts = [""] * len(requests)
        for (_, chosen), members in groups.items():
            # A sample depends on its row of the batch, so it gets a batch of its own.
            rows = 1 if "seed" in dict(chosen) else eval_batch_size(run.cfg)
            for some in chunks(members, rows):
                prompts = [prompt for _, prompt, _ in some]
                with jax.set_mesh(run.mesh):
                    outputs = generate(
                        *(run.spec, run.cfg.model, run.params, run.state),
                        prompts + prompts[-1:] * (rows - len(some)),
                        stop_tokens=run.tokenizer.stop_ids,
                        steer=self.steer,
                        compute=compute,
                        **dict(chosen),
                    )
                for (i, prompt, until), output in zip(some, outputs, strict=False):
                    texts[i] = run.tokenizer.continuation(prompt, output)
                    for stop in filter(None, until):
                        texts[i] = texts[i].split(stop)[0]
        return texts

    def _generation(self, options) -> tuple[list[str], dict]:
        """Read `generation_kwargs` as stop strings and arguments of `generate`."""
        from lm_eval.models.utils import normalize_gen_kwargs

        default = min(MAX_NEW_TOKENS, max(self.max_length // 2, 1))
        options = dict(normalize_gen_kwargs(options, default))
        for name in options.keys() - set(GENERATION):
            raise ConfigError(
                f"generation_kwargs.{name}: must be one of {', '.join(GENERATION)}."
            )
        N, limit = options["max_gen_toks"], self.max_length
        allowed = f"in [1, {limit}), below the seq_len of the run"
        require(1 <= N < limit, "generation_kwargs.max_gen_toks", N, allowed)
        return options["until"], {
            "max_new_tokens": N,
            "temperature": options.get("temperature", 0.0) * options["do_sample"],
            "top_k": options.get("top_k", 0),
            "top_p": options.get("top_p", 1.0),
        }


def score_tasks(
    place: Place,
    tasks: list[str],
    *,
    include_path=None,
    limit=None,
    num_fewshot=None,
    steering: Steering | None = None,
    weights: str | None = None,
) -> dict:
    """Evaluate tasks of the harness on the newest checkpoint of a run.

    Args:
      place: run directory; the result is added to its `harness.jsonl`.
      tasks: YAML files, or names of tasks that the harness or `include_path` has.
      include_path: folder of more tasks, by name.
      limit: documents per task, or below 1 a share of them; None: all.
      num_fewshot: examples before each question; None: the number of the task.
      steering: how experts are steered; None: as trained.
      weights: as for `load_lowered`; None: as trained.

    Returns:
      {"step", "lm_eval": its version, "limit", "num_fewshot": {task: examples},
      "tasks": {task: figures}}, as the harness names them; with "steering", its file,
      where the model is steered.

    Raises:
      ConfigError: without the package `lm_eval`, for a task that is not there, or a bad
        run directory.
      CheckpointError: if no checkpoint is intact.
    """
    require_token_ids(RunDir.of(place).config(), "moex eval --tasks")
    _need_harness()
    import lm_eval
    from lm_eval.tasks import TaskManager

    steer = steering_for(place, steering)
    if num_fewshot is not None:
        require(num_fewshot >= 0, "--num-fewshot", num_fewshot, "at least 0")
    if limit is not None:
        require(limit > 0, "--limit", limit, "above 0")
    named = [t for t in tasks if not t.endswith((".yaml", ".yml"))]
    for task in set(tasks) - set(named):
        require(pathlib.Path(task).is_file(), "--tasks", task, "a file that exists")
    # Reading all tasks of the harness takes seconds.
    manager = TaskManager(include_path=include_path, include_defaults=bool(named))
    for task in named:
        if task not in manager.all_tasks:
            hint = nearest(task, manager.all_tasks)
            raise ConfigError(f"--tasks = {task!r}: no such task or file.{hint}")
    if weights is None:
        run = load_run(place, warn=tell)
    else:
        run = load_lowered(place, weights, warn=tell)
    # The harness would fork this process for its bootstrap while JAX has threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout is for results
        found = lm_eval.simple_evaluate(
            model=HarnessLM(run, steer),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    result = {
        "step": run.step,
        "lm_eval": lm_eval.__version__,
        "limit": limit,
        "num_fewshot": found["n-shot"],
        "tasks": {
            task: {k: v for k, v in values.items() if isinstance(v, (int, float))}
            for task, values in found["results"].items()
        },
    }
    if weights is not None:
        result["weights"] = weights
    if steering is not None:
        result["steering"] = steering.where
    with open(RunDir.of(place).harness, "a", encoding="utf-8") as f:
        f.write(dump_json(result) + "\n")
    return result


def _need_harness() -> None:
    if TemplateLM is object:
        raise ConfigError(
            "the package lm_eval is missing; install the extra `eval`: "
            f"{hints.command('pip', 'install', 'moex[eval]')}"
        )
