"""`moex export-hf`: a run as a folder that transformers loads."""

import json
import math
from typing import Any

import jax
import numpy as np

from moex.config.base import ConfigError, require
from moex.data.chat import layout_of, saved_layout
from moex.interop.arrays import tensor_of
from moex.interop.card import CARD, model_card
from moex.interop.closest_family import closest, inference
from moex.interop.families import FAMILIES, find_family, read_model
from moex.interop.folder import (
    CONFIG,
    DTYPES,
    INDEX,
    SINGLE,
    extra_files,
    read_index,
    read_json,
)
from moex.interop.hf import RECORD
from moex.interop.names import Piece, pieces
from moex.interop.stored import Copies, written_out
from moex.interop.tokens import (
    SETTINGS,
    chat_files,
    ends,
    first_token,
    generation,
    written,
)
from moex.interop.writing import Tensor, write
from moex.json_files import field
from moex.model.layers import sites
from moex.model.paths import flat_paths
from moex.moe.contract import FixedK
from moex.runs.base import check_no_adapters
from moex.runs.claim import new_folder
from moex.runs.directory import Place, RunDir
from moex.runs.open import load_run
from moex.tasks.base import require_token_ids

KINDS = {kind.name for kind in DTYPES.values()}


def description(run: RunDir, cfg) -> tuple[dict, dict, dict, dict | None]:
    """(config.json, other files by name, dtype by tensor, index) of an export."""
    kept, own = run.imported, run.tokenizer()
    if (kept / RECORD).is_file():
        config = with_experts(read_json(kept / CONFIG), cfg.model)
        model = read_model(str(kept / CONFIG), config)
        if inference(model) == inference(cfg.model):
            # The export has no quantised numbers, code or layers after the last.
            config.pop("quantization_config", None)
            config.pop("auto_map", None)
            if "num_nextn_predict_layers" in config:
                config["num_nextn_predict_layers"] = 0
            files: dict[str, Any] = {f.name: f for f in extra_files(kept)}
            if run.saved_steps() != [0]:
                files |= generation(own, kept, config)
            layout = layout_of(cfg.data)
            if layout != saved_layout(cfg.data.tokenizer):
                about = read_json(kept / SETTINGS) if SETTINGS in files else {}
                files |= chat_files(own, about, layout)
            record, where = read_json(kept / RECORD), str(kept / RECORD)
            dtypes, index = field(record, "dtypes", dict[str, str], where), None
            for name, kind in dtypes.items():
                require(kind in KINDS, f"{where}: {name}", kind, "a type of a tensor")
            if record.get("whole"):
                index = {"weight_map": dict.fromkeys(dtypes, SINGLE)}
                if (kept / INDEX).is_file():
                    index = read_index(kept / INDEX)
            return config, files, dtypes, index
    # Without these fields transformers takes the ids of the family's first model.
    config = closest(cfg.model) | {
        "max_position_embeddings": cfg.seq_len,
        "bos_token_id": first_token(own),
        "eos_token_id": ends(own),
        "pad_token_id": None,
    }
    files = written(own, run.tokenizer_folder, layout_of(cfg.data))
    return config, files, {}, None


def with_experts(config: dict, model) -> dict:
    """The `config.json` of an imported model with as many experts as it has now.

    Pruned layers have fewer; where they differ, no family has the model.
    """
    name = find_family(CONFIG, config).experts
    moes = [site.sparse.moe for site in sites(model) if site.sparse is not None]
    if not name or not moes:
        return config
    own = {name: moes[0].num_experts}
    if isinstance(moes[0].router, FixedK):
        own["num_experts_per_tok"] = moes[0].router.k
    return config | {k: v for k, v in own.items() if config.get(k, v) != v}


def export_hf(place: Place, out, *, dtype: str | None = None, say=print) -> dict:
    """Write a run's newest checkpoint as a folder that transformers loads.

    An imported run leaves as its family, each tensor in the dtype and the file it came
    in. Any other run leaves as the closest family, or is refused with the reason.
    Experts that share weights are written out for each choice.

    Args:
      place: run directory.
      out: the folder; must not exist or be empty.
      dtype: type of all tensors but the state of routers; None: as imported, float32
        for others.
      say: called with each line of news.

    Returns:
      The `config.json` that is written.

    Raises:
      ConfigError: if no family has the model, or for a user's mistake.
    """
    run = RunDir.of(place)
    if jax.process_count() > 1:
        raise ConfigError("export-hf: runs in one process; all shards must be here.")
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype={dtype}: must be float32, bfloat16 or float16.")
    cfg = run.config()
    require_token_ids(cfg, "moex export-hf")
    check_no_adapters(run, "moex export-hf", " (--adapter writes them alone)")
    target = new_folder(out, f"--out={out}")
    cfg.model = written_out(cfg.model)
    config, files, dtypes, index = description(run, cfg)
    family = FAMILIES[config["model_type"]]
    wanted = list(pieces(cfg.model, family.names))
    if index is not None:  # there may be fewer experts than in the folder that came
        kept = {p.name: index["weight_map"][p.name] for p in wanted}
        if kept != index["weight_map"]:
            index = {"weight_map": kept}
    loaded = load_run(run, warn=say)
    state = flat_paths(loaded.state)
    copies = Copies(loaded.cfg.model, flat_paths(loaded.params) | state)
    if copies:
        say(
            "experts that share weights are written out for each choice: the folder is "
            "not smaller than without sharing"
        )
    before = config.pop("torch_dtype", None)  # its name up to transformers 4
    config["dtype"] = dtype or config.get("dtype") or before or "float32"

    def tensor(piece: Piece) -> Tensor:
        # Selection biases stay what they are: rounded, they choose other experts.
        given = None if piece.path in state else dtype
        kind = np.dtype(given or dtypes.get(piece.name, "float32"))
        return Tensor(
            piece.name,
            piece.shape,
            kind,
            lambda: tensor_of(*copies.of(piece), kind),
        )

    files["config.json"] = json.dumps(config, indent=2) + "\n"
    files[CARD] = model_card(target.name, loaded, config)
    write(out, [tensor(p) for p in wanted], files=files, index=index)
    size = sum(math.prod(p.shape) for p in wanted)
    say(f"{out}: {len(wanted)} tensors, {size:,} parameters, {config['model_type']}")
    return config
