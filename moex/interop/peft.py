"""LoRA in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

A matrix of ours may hold several projections, and stacked layers. Where PEFT adapts
only some of them, the others have zeros in both factors: their gradients are zeros too,
so they stay as they are in training, and an export leaves them out. A site whose rank
is lower than that of others is filled up with zeros in the same way.
"""

import re
from typing import Any

import numpy as np

from moex.adapters.lora import LoRA, factors
from moex.config.base import ConfigError, nearest, require, short
from moex.interop.folder import Stored, stored_tensors
from moex.interop.peft_names import EMBED, HEAD, PREFIX, Site
from moex.json_files import field, read_object

SETTINGS = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# Fields that must be off: they change what an adapter computes, or add other tensors.
OFF = (
    *("fan_in_fan_out", "use_dora", "lora_bias", "modules_to_save"),
    *("trainable_token_indices", "layer_replication", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config"),
    *("velora_config", "monteclora_config", "ensure_weight_tying"),
)
# Fields that name, place or start an adapter, and change nothing that it computes.
OF_NO_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "peft_version", "runtime_config", "qalora_group_size"),
    *("megatron_config", "megatron_core", "loftq_config", "corda_config"),
    *("eva_config", "lora_ga_config"),
)
READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights"),
    *("use_rslora", "target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
)
# Initial values that change the base too.
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def lora_of(settings: dict[str, Any], where: str, adapted: list[Site]) -> LoRA:
    """The LoRA config of an `adapter_config.json`; its rank is the highest of a site.

    Args:
      settings: its fields.
      where: begins error messages.
      adapted: the sites that it targets.

    Raises:
      ConfigError: for another kind of adapter, or a setting without a counterpart.
    """
    kind = field(settings, "peft_type", str, where)
    require(kind == "LORA", f"{where}: peft_type", kind, "'LORA'; moex reads no other")
    for name in OFF:
        value = settings.get(name)
        require(not value, f"{where}: {name}", value, "off; moex has no counterpart")
    for name in sorted(settings.keys() - {*OFF, *READ, *OF_NO_EFFECT}):
        if settings[name]:
            raise ConfigError(
                f"{where}: {name} = {short(settings[name], 60)}: moex does not know "
                f"this field, so it must be off.{nearest(name, (*READ, *OFF))}"
            )
    bias = field(settings, "bias", str, where, "none")
    require(bias == "none", f"{where}: bias", bias, "'none'; biases are of the base")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        told = "a kind that leaves the base as it is; let peft convert it to plain LoRA"
        require(False, f"{where}: init_lora_weights", start, told)
    pairs = {
        (rank_of(settings, site, where), _alpha_of(settings, site, where))
        for site in adapted
    }
    scales = sorted({alpha / rank for rank, alpha in pairs})
    told = "one number for all that is adapted"
    require(len(scales) <= 1, f"{where}: alpha / rank", scales, told)
    rank, alpha = max(pairs, default=(1, 1.0))
    dropout = field(settings, "lora_dropout", float, where, 0.0)
    require(0 <= dropout < 1, f"{where}: lora_dropout", dropout, "in [0, 1)")
    return LoRA(
        rank=rank,
        alpha=float(alpha),
        dropout=float(dropout),
        targets=tuple(sorted({site.path for site in adapted})),
    )


def rank_of(settings: dict[str, Any], site: Site, where: str) -> int:
    """The rank of a site: `r`, or that of the first key that fits in `rank_pattern`."""
    by_name = field(settings, "rank_pattern", dict[str, int] | None, where, None) or {}
    rank = _of_pattern(by_name, site, where, field(settings, "r", int, where))
    require(rank >= 1, f"{where}: r", rank, "at least 1")
    return rank


def _alpha_of(settings: dict[str, Any], site: Site, where: str) -> float:
    """The number whose quotient by the rank is the factor on a site's change."""
    kind = dict[str, float] | None
    by_name = field(settings, "alpha_pattern", kind, where, None) or {}
    own = field(settings, "lora_alpha", float, where)
    alpha = _of_pattern(by_name, site, where, own)
    require(alpha > 0, f"{where}: lora_alpha", alpha, "above 0")
    root = field(settings, "use_rslora", bool, where, False)
    return alpha * rank_of(settings, site, where) ** 0.5 if root else alpha


def _of_pattern(by_name: dict[str, Any], site: Site, where: str, default):
    for key, value in by_name.items():
        if _matches(rf"(.*\.)?({key})", site.full, where):
            return value
    return default


def settings_of(lora: LoRA, adapted: list[Site], every: list[Site]) -> dict[str, Any]:
    """The fields of `adapter_config.json` for some sites of a model's `every` site."""
    full = {site.full for site in adapted}
    partly = {site.target for site in every if site.full not in full}
    modules, parameters = set[str](), set[str]()
    for site in adapted:
        name = site.full if site.target in partly else site.target
        (parameters if site.parameter else modules).add(name)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        # PEFT has no dropout for adapted parameters.
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
    }


def names_of(site: Site, adapted: set[str]) -> tuple[str, str]:
    """The names of the two tensors of a site; `adapted`: full names of all sites."""
    at = f"{PREFIX}{site.module}"
    if site.module.endswith(EMBED):
        return f"{at}.lora_embedding_A", f"{at}.lora_embedding_B"
    if site.parameter == "gate_up_proj" and f"{site.module}.down_proj" in adapted:
        at += ".base_layer"  # PEFT wraps the second parameter around the first
    return f"{at}.lora_A.weight", f"{at}.lora_B.weight"


def tensors_of(arrays: dict[str, np.ndarray], every: list[Site], settings=None):
    """Make the tensors of PEFT of our arrays.

    Args:
      arrays: those of LoRA adapters by path.
      every: all sites of the model.
      settings: the `adapter_config.json` that says the rank of each site; None: all
        have that of the arrays.

    Returns:
      ({name: array}, the adapted sites). Parts whose arrays are all 0 are left out.

    Raises:
      ConfigError: if PEFT cannot adapt a matrix that is adapted.
    """
    reachable = {name for site in every for name in factors(site.path)}
    for name in sorted(arrays.keys() - reachable):
        raise ConfigError(f"export-hf --adapter: PEFT has no form for {name}.")
    values = {}
    for site in every:
        a, b = factors(site.path)
        if a in arrays:
            rank = None if settings is None else rank_of(settings, site, SETTINGS)
            pair = site.tensors(arrays[a], arrays[b], rank)
            if any(np.any(value) for value in pair):
                values[site] = pair
    full = {site.full for site in values}
    named = {
        name: np.ascontiguousarray(value)
        for site, pair in values.items()
        for name, value in zip(names_of(site, full), pair, strict=True)
    }
    return named, list(values)


def read_peft(
    path, every: list[Site], base
) -> tuple[LoRA, dict[Site, dict[str, Stored]]]:
    """The config and the tensors of a folder of PEFT.

    Args:
      path: the folder.
      every: all sites of the base model.
      base: names it in errors.

    Returns:
      (config, {site: the two tensors as `Stored`, by name}).

    Raises:
      ConfigError: if they do not fit each other or the base; for pickles.
    """
    where = str(path / SETTINGS)
    settings, file = read_object(path / SETTINGS), path / TENSORS
    if not file.is_file():
        if (path / PICKLE).is_file():
            raise ConfigError(
                f"{path}: has its weights as a pickle only ({PICKLE}), which is not "
                "read: unpickling runs code that the file contains. Save it with "
                "safe_serialization=True of peft."
            )
        raise ConfigError(f"{path}: has no {TENSORS}.")
    stored = stored_tensors(file)
    adapted = [site for site in every if _targeted(settings, site, where)]
    full = {site.full for site in adapted}
    pairs = {site: names_of(site, full) for site in adapted}
    lora = lora_of(settings, where, adapted)
    wanted = {name for pair in pairs.values() for name in pair}
    for name in sorted(stored.keys() - wanted):
        told = f"{file}: tensor {short(name)} belongs to nothing that {SETTINGS}"
        if name.endswith(".base_layer.weight"):
            hint = " It is a copy of the base: save_embedding_layers=False of peft."
        else:
            hint = nearest(name, wanted - stored.keys())
        raise ConfigError(f"{told} targets in {base}.{hint}")
    if not stored:
        raise ConfigError(f"{file}: has no tensors.")
    for site, pair in pairs.items():
        shapes = site.shapes(rank_of(settings, site, where))
        for name, shape in zip(pair, shapes, strict=True):
            _check(file, name, stored, shape, base)
    return lora, {site: {n: stored[n] for n in pair} for site, pair in pairs.items()}


def _check(file, name: str, stored: dict[str, Stored], shape, base) -> None:
    if name not in stored:
        told = f"{file}: tensor {name!r} is missing."
        raise ConfigError(f"{told}{nearest(name, stored)}")
    found = stored[name]
    if found.shape != shape:
        raise ConfigError(
            f"{file}: tensor {name!r} has shape {list(found.shape)}; r of {SETTINGS} "
            f"and {base} make it {list(shape)}."
        )
    check_type(name, found, ("float32", "bfloat16", "float16"))


def check_type(name: str, tensor: Stored, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless a tensor is of one of the types `allowed`."""
    if tensor.dtype.name not in allowed:
        raise ConfigError(
            f"{tensor.file}: tensor {name!r} is of type {tensor.dtype.name}; must be "
            f"{' or '.join(allowed)}."
        )


def finite(name: str, tensor: Stored) -> np.ndarray:
    """Read a tensor.

    Raises:
      ConfigError: if a number of it is not finite.
    """
    array = tensor.read()
    if not np.all(np.isfinite(array.astype(np.float32))):
        raise ConfigError(
            f"{tensor.file}: tensor {name!r} has numbers that are not finite."
        )
    return array


def _targeted(settings: dict[str, Any], site: Site, where: str) -> bool:
    """Tell whether PEFT adapts a site, as its `check_target_module_exists` does."""
    modules = field(settings, "target_modules", str | list[str] | None, where, None)
    parameters = field(settings, "target_parameters", list[str] | None, where, None)
    excluded = field(settings, "exclude_modules", str | list[str] | None, where, None)
    only = field(settings, "layers_to_transform", int | list[int] | None, where, None)
    if site.parameter and _matches(parameters, site.full, where):
        return True  # `exclude_modules` and `layers_to_transform` are of modules alone
    if _matches(excluded, site.module, where):
        return False
    stacked = site.experts is not None
    if modules == "all-linear":
        return not stacked and not site.module.endswith((EMBED, HEAD))
    if stacked or not _matches(modules, site.module, where):
        return False
    layer = re.search(r"\.layers\.(\d+)\.", site.module)
    layers = [only] if isinstance(only, int) else only
    return not layers or (layer is not None and int(layer[1]) in layers)


def _matches(wanted: str | list[str] | None, name: str, where: str) -> bool:
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None
        except re.error as e:
            told = f"{where}: {wanted!r} is no regular expression: {e}."
            raise ConfigError(told) from None
    return any(name == w or name.endswith(f".{w}") for w in wanted or ())
