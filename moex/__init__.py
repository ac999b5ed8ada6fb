"""moex: a research training framework for mixture-of-experts models.

The names below are what configs, notebooks and kinds of your own need. Each is loaded
when it is first asked for, so that `import moex` is quick and brings no JAX.
"""

import importlib

__version__ = "0.3.0"

# The public names of each module.
PUBLIC = {
    "moex.adapters.lora": "LoRA",
    "moex.adapters.loramoe": "LoRAMoE",
    "moex.adapters.moram": "MoRAM",
    "moex.adapters.v2": "AdapterV2 Visual",
    "moex.allocator": "keep_memory",
    "moex.cache": "keep_programs",
    "moex.config.base": "Config ConfigError check",
    "moex.config.schedule": "Schedule",
    "moex.data.contract": "Document FileSource Source TokenizerConfig",
    "moex.data.pipeline": "Data",
    "moex.data.procedural": "Copies Modular WordProblems",
    "moex.data.series": "Series",
    "moex.data.sources": "Parquet PromptResponse PythonStdlib Text",
    "moex.data.tokenizer": "Bpe Bytes TokenizerFile",
    "moex.sharding": "MeshConfig",
    "moex.nn.attention": "Attention",
    "moex.nn.context": "Compute Context",
    "moex.nn.contract": "AttentionConfig AttentionModule FeedForward FeedForwardConfig",
    "moex.nn.lm": "LM",
    "moex.nn.mla": "LatentAttention",
    "moex.nn.mlp": "Dense",
    "moex.nn.model": "Model",
    "moex.nn.param": "param",
    "moex.nn.projection": "Adapter AdapterConfig Matrix",
    "moex.nn.series": "SeriesModel",
    "moex.nn.stack": "Segment",
    "moex.moe.balance": "Controller",
    "moex.moe.chain": "Chain",
    "moex.moe.contract": "Experts ExpertsConfig FixedK Router RouterConfig",
    "moex.moe.experts.glu": "Glu",
    "moex.moe.experts.latent": "Latent",
    "moex.moe.experts.lowrank": "LowRank",
    "moex.moe.experts.lowrank_glu": "LowRankGlu",
    "moex.moe.experts.zero": "Zero",
    "moex.moe.layer": "MoE",
    "moex.moe.narrow": "Narrow",
    "moex.moe.routers.expert_choice": "ExpertChoice",
    "moex.moe.routers.forced": "Forced",
    "moex.moe.routers.hash": "Hash",
    "moex.moe.routers.soft": "Soft",
    "moex.moe.routers.topk": "Groups TopK",
    "moex.moe.routers.topp": "TopP",
    "moex.moe.routing": "Routing",
    "moex.tasks.base": "Task",
    "moex.model.optim": "AdamW Muon Optim",
    "moex.model.pruning": "PruneRows",
    "moex.runs.keys": "Checkpoint Eval Log Loss",
    "moex.runs.open": "load_run",
    "moex.tasks.distillation": "Distillation",
    "moex.tasks.lm": "LanguageModelling",
    "moex.tasks.regression": "Regression",
    "moex.convert.base": "Conversion",
    "moex.commands": "Verb",
}
MODULES = {name: module for module, names in PUBLIC.items() for name in names.split()}

__all__ = ["__version__", *MODULES]


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module 'moex' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
