"""`moex import-hf`: a run from a Hugging Face folder.

The folder's own files (config, tokenizer, generation config, index of shards) are kept
in `RUN/hf`, with the dtype of every tensor, so that an export gives back what came in.
"""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from moex.config.base import ConfigError, nearest, require
from moex.config.flags import load_config as load_config_flags
from moex.data.contract import Corpus
from moex.data.encoding import MODEL
from moex.data.files import atomic_write
from moex.data.pipeline import Data, unread
from moex.data.tokenizer import SavedTokenizer, TokenizerFile
from moex.interop.arrays import load_array
from moex.interop.dequantise import reader
from moex.interop.families import find_family, read_model, unused_tensors
from moex.interop.fields import Fields
from moex.interop.folder import CONFIG, INDEX, Folder, extra_files
from moex.interop.names import Piece, pieces
from moex.interop.tokens import (
    check_tokens,
    end_ids,
    end_token,
    set_ends,
    tokenizer_file,
)
from moex.model import spec as states
from moex.model.accounting import num_bytes
from moex.model.optim import AdamW, Optim, make_optimizer
from moex.model.paths import path_name
from moex.progress import phase
from moex.runs.claim import new_folder, new_run
from moex.runs.directory import RunDir
from moex.runs.keys import Checkpoint, Eval, Log, Loss, check_run
from moex.runs.open import differences
from moex.runs.program import Program, mesh_here
from moex.runs.room import check_room
from moex.runs.write import write_run
from moex.sharding import MeshConfig

RECORD = "import.json"
# Other forms of tokenizer.json, which it replaces.
VOCABULARIES = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 1024  # rows of a tensor that are compared at a time


def import_hf(
    folder,
    out,
    config_args: list[str] = (),  # type: ignore[assignment]
    *,
    tokenizer=None,
    doc_token: str | None = None,
    say=print,
) -> dict:
    """Write a run directory that holds the model of a folder, at step 0.

    Every check comes before anything is read, and all is written to a folder next to
    `out` first, so that an error leaves no run behind.

    Args:
      folder: with `config.json` and safetensors.
      out: the run directory; must not exist or be empty.
      config_args: `--config.a.b=value` on the run config, such as the mesh.
      tokenizer: file to use in place of the folder's `tokenizer.json`.
      doc_token: token between documents; None: the end-of-text token of the folder.
      say: called with each line of news.

    Returns:
      The content of `RUN/hf/import.json`.

    Raises:
      ConfigError: for a user's mistake or a broken folder, naming file and tensor.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            "import-hf: runs in one process; a job of several reads its run directory."
        )
    out = new_folder(out, f"--out={out}")
    opened = Folder.open(folder)
    source = reader(opened)
    where = str(opened.path / CONFIG)
    family = find_family(where, opened.config)
    model = read_model(where, opened.config, say)
    wanted, unused = check_tensors(source, family, model, opened.config)
    file = tokenizer_file(opened.path, tokenizer)
    rows: Any = model.vocab
    check_tokens(file, rows)
    doc_token = doc_token or end_token(opened.path, opened.config, file)
    ends = end_ids(opened.path, opened.config)
    shapes = states.model_spec(model).shapes()
    cfg = _run_config(model, where, opened.config, config_args)
    given, allowed = cfg.model.vocab, f"{rows} or left out: the folder has no more"
    require(given == rows, "--config.model.vocab", given, allowed)
    changed = states.model_spec(cfg.model).shapes()
    for name, new, old in differences(changed, shapes):
        raise ConfigError(
            f"--config.model...: changes {name}, of shape {old} in the folder, to "
            f"{new} (None: there is none); import it as it is, then convert it."
        )
    cfg.data.tokenizer = TokenizerFile(path=str(file), doc_token=doc_token)
    program, tx, data = _prepare(cfg, say)
    with new_run(out, f"--out={out}", say) as temporary:
        kept = temporary.imported
        kept.mkdir(parents=True)
        set_ends(data.tokenizer, opened.path, file, ends)
        for name in unused:
            say(f"not used: {name}")
        say(f"reading {len(wanted)} tensors of {opened.path}")
        arrays = load_model(program.spec, program.mesh, wanted, source)
        for extra in (*extra_files(opened.path), opened.path / INDEX):
            if extra.is_file() and (
                tokenizer is None or extra.name not in VOCABULARIES
            ):
                shutil.copyfile(extra, kept / extra.name)
        shutil.copyfile(file, kept / MODEL)  # --tokenizer may have given another
        record = {
            "from": str(opened.path),
            "model_type": opened.config["model_type"],
            "dtypes": {p.name: source[p.name].dtype.name for p in wanted},
            "unused": unused,
            # An export may then have the same files as the folder.
            "whole": source is opened and not unused,
        }
        atomic_write(kept / RECORD, json.dumps(record, indent=1) + "\n")
        saved = RunDir(out).tokenizer_folder
        cfg.data.tokenizer = SavedTokenizer(path=str(saved))
        write_run(temporary, cfg, program, tx, data, arrays)
    return record


def check_tensors(source, family, model, config) -> tuple[list[Piece], list[str]]:
    """Check names and shapes of all tensors.

    Returns:
      All pieces of the model, and the names of the tensors on the family's list of
      those that moex does not use, sorted.

    Raises:
      ConfigError: for a missing tensor, one of another shape, or one too many, and for
        logits of their own where the config says that embeddings are tied.
    """
    names, wanted = source.names, []
    # Stop at the first one missing: a config can ask for any number of tensors.
    for piece in pieces(model, family.names):
        if piece.name not in names:
            some = itertools.islice(pieces(model, family.names), 2 * len(names))
            own = {p.name for p in some}
            raise ConfigError(
                f"{source.listing}: tensor {piece.name!r} is missing."
                f"{nearest(piece.name, names - own)}"
            )
        tensor = source[piece.name]
        where = f"{tensor.file}: tensor {piece.name!r}"
        if tensor.shape != piece.shape:
            raise ConfigError(
                f"{where} has shape {list(tensor.shape)}; config.json makes it "
                f"{list(piece.shape)}."
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ConfigError(
                f"{where} is of type {tensor.dtype}; weights are of a floating-point "
                "type."
            )
        wanted.append(piece)
    unused = sorted(names - {p.name for p in wanted})
    where = str(source.path / CONFIG)
    needless = unused_tensors(family, where, config, model.num_layers())
    for name in unused:
        if model.tied_embeddings and name == HEAD:
            _check_tied(source)
        elif not needless.fullmatch(name):
            raise ConfigError(
                f"{source[name].file}: tensor {name!r} is one too many: a "
                f"{config['model_type']} of this config.json has none."
            )
    return wanted, unused


def _check_tied(source) -> None:
    """Check that the matrix of logits is a copy of the embeddings.

    Where it is not, which of the two the model was trained with cannot be seen.
    """
    head, embed = source[HEAD], source[EMBED]
    same = head.shape == embed.shape
    for start in range(0, head.shape[0] if same else 0, ROWS):
        rows = (slice(start, start + ROWS),)
        same = same and np.array_equal(head.read(rows), embed.read(rows))
    if not same:
        raise ConfigError(
            f"{head.file}: tensor {HEAD!r} differs from {EMBED!r}, but "
            f"{source.path / 'config.json'} says tie_word_embeddings = true; set it to "
            "false to read both, or remove the tensor."
        )


def load_model(spec, mesh, wanted: list[Piece], source) -> dict:
    """{"params", "state"} as `write_run` takes them, each array on its devices.

    Args:
      spec: `ModelSpec` of the model that `wanted` is of.
      mesh: where the arrays go.
      wanted: all pieces of the model.
      source: the `Folder`.
    """
    by_path: dict[str, list[Piece]] = {}
    for piece in wanted:
        by_path.setdefault(piece.path, []).append(piece)
    params, state = states.shardings(spec, mesh)
    assert spec.shapes().keys() == by_path.keys(), spec.shapes().keys() ^ by_path.keys()

    def load(path, leaf, sharding):
        pieces_of = by_path[path_name(path)]
        loaded = load_array(leaf.shape, leaf.dtype, sharding, pieces_of, source)
        at.add(loaded.nbytes)
        return loaded

    walk = jax.tree_util.tree_map_with_path
    total = num_bytes((spec.params, spec.state))
    with phase("reading tensors", total, "B") as at:
        return {
            "params": walk(load, spec.params, params),
            "state": walk(load, spec.state, state),
        }


def _run_config(model, where, config, config_args):
    """A config to go on training with; its learning rate is for a trained model."""
    cfg = ml_collections.ConfigDict(convert_dict=False)
    of = Fields(where, config, {"max_position_embeddings": 2048})
    longest = of("max_position_embeddings", int, least=2, null=2048)
    cfg.update(
        {
            **{"seed": 0, "steps": 1000, "batch_size": 8, "grad_accum": 1},
            **{"seq_len": min(longest, 2048), "precision": "auto", "remat": "none"},
            **{"scan_layers": True, "kernels": "auto", "nan_limit": 10},
            **{"init_from": "", "model": model, "data": Data(), "loss": Loss()},
            **{"mesh": MeshConfig(), "eval": Eval(), "checkpoint": Checkpoint()},
            **{"log": Log()},
            "optim": Optim(rule=AdamW(), lr=1e-5, warmup_steps=50, weight_decay=0.1),
        }
    )
    cfg = load_config_flags(list(config_args), base=cfg)
    check_run(cfg)
    return cfg


def _prepare(cfg, say) -> tuple[Program, Any, Any]:
    """Check a config, and make its program, optimizer and data."""
    mesh = mesh_here(cfg)
    no_text: Corpus = (lambda size: [], "")
    tokenizer = cfg.data.tokenizer.make("config.data.tokenizer", no_text, Path())
    data = unread(cfg.data, cfg.seq_len, tokenizer)
    spec = states.model_spec(cfg.model, mesh)
    program = Program(cfg=cfg, mesh=mesh, spec=spec)
    tx, _ = make_optimizer(cfg.optim, cfg.steps, spec.params, spec.info)
    held = program.abstract_state() | {"opt": states.abstract_opt(tx, spec, mesh)}
    check_room(cfg, mesh, held)
    return program, tx, data
