"""The model card of an export: a README.md that says what the run itself knows."""

import shlex
from collections.abc import Iterator

import moex
from moex.config.base import describe
from moex.interop.hf import RECORD
from moex.json_files import field, read_object
from moex.model.accounting import model_cost
from moex.model.layers import layers
from moex.moe.layer import MoE
from moex.runs.lines import read_metrics
from moex.runs.open import LoadedRun
from moex.runs.score import held_out

CARD = "README.md"
LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer({prompt!r}, return_tensors="pt")
(ids,) = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(ids, skip_special_tokens=True))
```

Unless `generation_config.json` says otherwise, it takes the likeliest token each time.
In float32 it then writes the text of this command, but for errors of rounding:

    moex generate RUN --temperature=0 --max-new-tokens=64 --prompt={quoted}
"""

LICENCE = """\
None is stated here. Whoever publishes the model chooses one that its data allows, and
the licence of the model that it was made from, if there is one.
"""


def model_card(title: str, run: LoadedRun, config: dict) -> str:
    """The text of the README.md of an export.

    It has no path of this machine, because folders of models are published.

    Args:
      title: name of the model.
      run: what is exported.
      config: the `config.json` of the export.
    """
    cfg = run.cfg
    lines = read_metrics(run.folder.metrics)
    scored = {s: line for s, line in lines.get("eval", {}).items() if s <= run.step}
    score = held_out(cfg.task, scored)
    prompt = next(iter(cfg.log.sample_prompts), "The ")
    moe = any(isinstance(site.ffn, MoE) for site, _ in layers(cfg.model))
    tags = ["moex", *(["mixture-of-experts"] if moe else [])]
    head = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(run, lines))
    parts = [
        "\n".join(head),
        f"# {title}",
        f"A language model of moex {moex.__version__} in the form of the family "
        f"`{config['model_type']}` of transformers.{''.join(_origin(run))}",
        f"| | |\n|---|---|\n{rows}",
        f"Score: {score or 'nothing was scored on held-out data'}.",
        "## How to load it",
        LOADING.format(prompt=prompt, quoted=shlex.quote(prompt)).strip(),
        "## Config",
        f"```\n{describe(cfg.model, 'model')}\n{describe(cfg.optim, 'optim')}\n```",
        "## Licence",
        LICENCE.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def _origin(run: LoadedRun) -> Iterator[str]:
    """Sentences on where the parameters of step 0 came from, if not from the seed."""
    record = run.folder.imported / RECORD
    if record.is_file():
        kind = field(read_object(record), "model_type", str, str(record))
        yield f" It was imported from a checkpoint of `{kind}`"
        yield "." if run.step == 0 else ", and trained on since."
    if run.folder.conversion.is_file():
        yield " `moex convert` made it from another trained run."
    if run.cfg.init_from:
        yield " It started from the parameters of another run."


def _facts(run: LoadedRun, lines: dict) -> Iterator[tuple[str, str]]:
    """The rows of the card's table."""
    cfg = run.cfg
    cost = model_cost(cfg.model, run.spec, cfg.seq_len)
    yield (
        "parameters",
        f"{cost.num_params:,}, of which a token uses {cost.num_active:,}",
    )
    count = cfg.model.num_layers()
    yield "layers", f"{count} of width {cfg.model.dim}"
    yield "vocabulary", f"{cfg.model.vocab:,} tokens"
    if run.step == 0:
        return
    yield "training", f"{run.step:,} steps of {cfg.steps:,}"
    seen = [
        line["tokens_seen"]
        for step, line in lines.get("train", {}).items()
        if step <= run.step and "tokens_seen" in line
    ]
    if seen:
        yield "tokens seen", f"{seen[-1]:,}"
    yield "batches", f"{cfg.batch_size:,} sequences of {cfg.seq_len:,} tokens"
    yield "data", ", ".join(source.label() for source in cfg.data.sources)
    yield "seed", str(cfg.seed)
