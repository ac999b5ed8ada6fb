"""Language modelling: the loss, its figures, and text samples from the model.

B batch · L length · V vocabulary
"""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moex import hints
from moex.config.base import ConfigError, require, short, to_dict
from moex.data.chat import layout_of, question, saved_layout
from moex.data.from_paths import given_sources
from moex.data.pipeline import Data, Prepared, prepare
from moex.data.report import compressor_bits_per_byte
from moex.data.tokenizer import Bpe, SavedTokenizer, Tokenizer
from moex.model.decode import check_request, generate
from moex.model.precision import compute_dtype
from moex.moe.metrics import mean
from moex.nn.contract import not_causal
from moex.nn.lm import LM
from moex.tasks.base import Figure, Task


@dataclasses.dataclass(kw_only=True, slots=True)
class LanguageModelling(Task):
    """The next token of a text, from all tokens before it."""

    MODEL = LM
    DATA = Data
    FIGURES = (
        Figure("nll", "loss", "nats per token"),
        Figure("bits_per_byte", "bits per byte", "bits per byte", "bpb"),
    )
    COUNTS = ("tokens", "bytes")
    LOSSES = ("z",)
    TOKEN_IDS = True

    def check_run(self, cfg):
        Task.check_run(self, cfg)
        where = not_causal(cfg.model)
        require(
            where is None or cfg.log.sample_tokens == 0,
            "config.log.sample_tokens",
            cfg.log.sample_tokens,
            f"0: {where} chooses tokens by those that follow, so the model cannot "
            "generate",
        )

    def like(self, cfg, run):
        """Use the tokenizer of the run: ids then mean what its model learned."""
        saved = SavedTokenizer(path=str(run.tokenizer_folder))
        cfg.data = dataclasses.replace(cfg.data, tokenizer=saved)

    def prepare(self, cfg, *, log=print, scoring=False) -> Prepared:
        options = {"overlap": cfg.eval.overlap, "scoring": scoring, "log": log}
        data = prepare(cfg.data, cfg.seq_len, where="config.data", **options)
        adapter = cfg.model.adapter
        fields = {} if adapter is None else adapter.fields()
        given = [len(e) and fields.keys() <= e.sequence(0).keys() for e in data.train]
        if not scoring and not any(given):
            names = ", ".join(fields)
            log(f"data: warning: no source has {names}, which the adapter trains with")
        for examples in (*data.train, *data.eval):  # text has no visual tokens
            examples.defaults = {
                name: np.zeros(shape, dtype) for name, (shape, dtype) in fields.items()
            }
        return data

    def num_domains(self, cfg):
        return len(cfg.data.sources)

    def fill(self, cfg, data=None):
        """Fill in the vocabulary; with data, check that it and the samples fit."""
        if data is None:
            _fill_vocab(cfg)
            return
        vocab = data.tokenizer.vocab_size
        if cfg.model.vocab is None:
            cfg.model.vocab = vocab
        require(
            cfg.model.vocab >= vocab,
            "config.model.vocab",
            cfg.model.vocab,
            f"at least the vocabulary of the tokenizer, {vocab} (or None to take it)",
        )
        _check_samples(cfg, data.tokenizer)

    def given(self, data, paths, *, train=False):
        layout = saved_layout(data.tokenizer)
        sources = given_sources(paths, train=train, layout=layout)
        return dataclasses.replace(data, sources=sources, given=tuple(paths))

    def resumed(self, data, run):
        """Use the run's own tokenizer, so that it is not trained again.

        That would give another one if files have changed, or on more text.
        """
        trained = isinstance(data.tokenizer, Bpe)
        if not trained or to_dict(run.config().data) != to_dict(data):
            return data
        saved = SavedTokenizer(path=str(run.tokenizer_folder))
        return dataclasses.replace(data, tokenizer=saved)

    def save(self, data, run):
        """Write the tokenizer."""
        data.tokenizer.save(run.tokenizer_folder)

    def opened(self, cfg, run):
        """Use the run's copy of a tokenizer that is no longer where the config says.

        That is so when the folder was moved, or came from another machine.
        """
        copy, tokenizer = run.tokenizer_folder.absolute(), cfg.data.tokenizer
        saved = isinstance(tokenizer, SavedTokenizer)
        if saved and copy.is_dir() and not pathlib.Path(tokenizer.path).exists():
            cfg.data.tokenizer = SavedTokenizer(path=str(copy))

    def identity(self, data):
        return {"tokenizer": data.tokenizer.fingerprint}

    def saved_identity(self, run):
        return {"tokenizer": run.tokenizer().fingerprint}

    def check_same(self, data, run, where, *, resume):
        own, here = run.tokenizer(), data.tokenizer
        if own.fingerprint == here.fingerprint:
            return
        sizes = f"(vocabulary {own.vocab_size}, here {here.vocab_size})"
        if resume:
            raise ConfigError(
                f"{where} holds a run with another tokenizer {sizes}; use another "
                "--workdir, or the tokenizer of that run."
            )
        raise ConfigError(
            f"{where}: has another tokenizer {sizes}; use "
            f"SavedTokenizer(path='{run.tokenizer_folder}') as config.data.tokenizer."
        )

    def fields(self, cfg):
        own = ((cfg.seq_len,), "int32")
        return Task.fields(self, cfg) | dict.fromkeys(
            ("tokens", "targets", "num_bytes"), own
        )

    def context(self, batch, **fields):
        return Task.context(self, batch, token_BL=batch["tokens"], **fields)

    def losses(self, outputs, batch):
        mask_BL = batch["loss_mask"]
        nll_BL, z_BL = token_losses(outputs, batch["targets"])
        return nll_BL, {
            "z": jnp.sum(z_BL * mask_BL),
            "guess": jnp.log(float(outputs.shape[-1])) * jnp.sum(mask_BL),
            "bytes": jnp.sum(batch["num_bytes"] * (mask_BL > 0).astype(jnp.int32)),
        }

    def figures(self, sums):
        return Task.figures(self, sums) | {
            "z": mean(sums["z"], sums["tokens"]),
            "bits_per_byte": mean(sums["nll"], sums["bytes"]) / jnp.log(2.0),
        }

    def result(self, figures):
        """Add perplexity to the figures."""
        perplexity = float(np.exp(figures["nll"]))
        return Task.result(self, figures) | {"perplexity": perplexity}

    def score_lines(self, result):
        """List loss, perplexity and, where tokens have text, bits per byte."""
        lines = [
            ("loss", f"{result['nll']:.4f} nats per token"),
            ("perplexity", f"{result['perplexity']:.3f}"),
        ]
        if result["bytes"]:
            lines.append(("bits per byte", f"{result['bits_per_byte']:.4f}"))
        return lines

    def brief(self, values):
        if math.isnan(values["nll"]):
            return "no target"
        return f"bpb {values['bits_per_byte']:.3f}"

    def conclusion(self, cfg, data, result, step, log):
        """Say bits per byte where there is text, with those of compressors if asked."""
        if not result["bytes"]:
            return f"held-out loss, nats per token: {result['nll']:.3f}"
        line = f"held-out bits per byte: {result['bits_per_byte']:.3f}"
        if not (log.active and cfg.log.compressors):
            return line
        try:  # this reads the text again
            reached = compressor_bits_per_byte(data, where="config.data")
        except (ConfigError, OSError) as e:  # the run itself is complete
            log.line(f"warning: no comparison with compressors: {e}")
            return line
        log.record("compressors", step, reached)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in reached.items())
        return f"{line} beside {figures} on the same {result['bytes']:,} bytes"

    def samples(self, program, state, data):
        """Continue each of `config.log.sample_prompts`."""
        log = program.cfg.log
        # Text needs the parameters on one host; otherwise there is `moex generate`.
        if log.sample_tokens == 0 or jax.process_count() > 1:
            return []
        return continue_texts(
            program,
            state,
            data.tokenizer,
            log.sample_prompts,
            max_new_tokens=log.sample_tokens,
            temperature=0.7,
            seed=program.cfg.seed,
        )

    def use_lines(self, cfg, run):
        prompt = [next(iter(cfg.log.sample_prompts), "The ")]
        if layout_of(cfg.data):
            prompt = ["Hello", "--chat"]
        line = hints.command("moex", "generate", run, "--prompt", *prompt)
        return [f"let it write: {line}"]


def token_losses(logits_BLV, targets_BL):
    """The cross-entropy (nats) and squared log-normaliser of targets, float32[B, L]."""
    lse_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return lse_BL - target_BL, lse_BL**2


def prompt_ids(tokenizer, text: str, chat: dict | None) -> list[int]:
    """The tokens of a prompt; with `chat` it is the message of a user."""
    if chat is None:
        return tokenizer.prompt(text)
    return question(tokenizer, text, **chat)


def continue_texts(
    program, state, tokenizer, prompts, *, chat=None, write=None, **sampling
) -> list[str]:
    """Continue each prompt, up to the first stop token; returns prompt and text.

    With `chat`, each prompt is a user's message; returns the answers alone.

    Args:
      program: `Program`, for the model and how to compute.
      state: {"params", "state"}.
      tokenizer: the tokenizer of the run.
      prompts: texts.
      chat: fields of `Chat`, from `layout_of`.
      write: takes prompts and the arguments of `generate` after them, and does its
        work; None: `generate` does.
      **sampling: arguments of `model.decode.generate`.
    """
    stops = tokenizer.stop_ids
    asked = [prompt_ids(tokenizer, text, chat) for text in prompts]
    if chat is not None:
        end = tokenizer.encode_markup(chat["eos_token"])
        stops = {*stops, *(end.tolist() if len(end) == 1 else ())}
    if write is None:
        arrays = state["params"], state["state"]
        write = functools.partial(generate, program.spec, program.cfg.model, *arrays)
    compute = program.compute(train=False)
    outputs = write(asked, stop_tokens=stops, compute=compute, **sampling)
    whole = tokenizer.continued if chat is None else tokenizer.continuation
    before = prompts if chat is None else asked
    return [whole(b, o) for b, o in zip(before, outputs, strict=True)]


def _fill_vocab(cfg) -> None:
    """Set `cfg.model.vocab` from the tokenizer's config alone."""
    if cfg.model.vocab is not None:
        return
    tokenizer = cfg.data.tokenizer
    cfg.model.vocab = tokenizer.known_size()
    if cfg.model.vocab is not None:
        return

    def no_text(size):
        raise ConfigError(
            f"config.model.vocab = None: and {type(tokenizer).__name__} has no size "
            "before it was trained; give --config.model.vocab=N."
        )

    where = "config.data.tokenizer"
    made = tokenizer.make(where, (no_text, ""), pathlib.Path())
    cfg.model.vocab = made.vocab_size


def _check_samples(cfg, tokenizer: Tokenizer) -> None:
    """Check early that text samples will work: the last step writes them."""
    if cfg.log.sample_tokens == 0:
        return
    try:
        prompts = [tokenizer.prompt(text) for text in cfg.log.sample_prompts]
        dtype = compute_dtype(cfg)
        check_request(cfg.model, prompts, cfg.log.sample_tokens, dtype)
    except ValueError as e:
        raise ConfigError(
            f"config.log.sample_prompts = {short(cfg.log.sample_prompts)}, "
            f"sample_tokens = {cfg.log.sample_tokens}: {e} sample_tokens = 0 writes no "
            "samples."
        ) from None
