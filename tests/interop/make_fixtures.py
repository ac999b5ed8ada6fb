"""Writes `fixtures/`: tiny random checkpoints and what transformers makes of them.

  python -m tests.interop.make_fixtures        (extra `hf`; transformers >= 5.23)

One folder per family: the checkpoint as `save_pretrained` writes it, and
`expected.npz` with padded tokens, logits at the real ones, the experts chosen in every
sparse layer, 64 tokens of greedy decoding, and for two families gradients.
"""

import json
import pathlib
import shutil

import numpy as np

from moex.data.tokenizer import DOC_TOKEN, train_bpe

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
V, D, E, F = 272, 32, 8, 12
COMMON = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,  # 64 tokens of decoding are wanted, whatever they are
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "moe_intermediate_size": F,
    "n_routed_experts": E,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
FAMILIES = {
    "mixtral": (
        "Mixtral",
        {"num_local_experts": E, "num_experts_per_tok": 2, "intermediate_size": F},
    ),
    "olmoe": (
        "Olmoe",
        {
            "num_experts": E,
            "num_experts_per_tok": 3,
            "intermediate_size": F,
            "norm_topk_prob": False,
            "clip_qkv": 1.5,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": E,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": F,
            "norm_topk_prob": True,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        MLA
        | {
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 4.0,
            "norm_topk_prob": False,
            "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        MLA
        | {
            "q_lora_rank": 20,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": E,
            "num_experts_per_tok": 3,
            "intermediate_size": F,
            "head_dim": 16,
            "sliding_window": 5,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": YARN | {"rope_theta": 150000.0, "truncate": False},
        },
    ),
    "llama": (
        "Llama",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
}
LENGTHS = (17, 9, 12)  # of the padded rows
WITH_GRADIENTS = ("mixtral", "deepseek_v3")


def randomise(model, torch) -> None:
    """Weights that make every part count: initial norms of 1 and biases of 0 do not."""
    rng = np.random.default_rng(0)
    for name, weight in sorted(model.state_dict().items()):
        noise = rng.normal(size=tuple(weight.shape))
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif "e_score_correction_bias" in name:
            value = 0.05 * noise
        elif "embed" in name or name.endswith("lm_head.weight"):
            value = noise * (1.0 if "embed" in name else D**-0.5)
        elif weight.ndim == 1 or "bias" in name:
            value = 0.3 * noise
        else:
            value = noise * (1.5 / weight.shape[-1] ** 0.5)
        with torch.no_grad():
            weight.copy_(torch.tensor(value, dtype=weight.dtype))


def write_tokenizer(folder) -> None:
    """A byte-level BPE of V tokens."""
    tokenizer = train_bpe(["the cat sees the dog and the bird. " * 20], V)
    assert tokenizer.get_vocab_size() == V
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": DOC_TOKEN}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def routers(model) -> dict:
    """Router modules by layer."""
    found = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] in ("gate", "router") and parts[-2] == "mlp":
            found[int(parts[2])] = module
    return found


def expected(model, family, torch) -> dict:
    """What transformers makes of padded tokens."""
    rng = np.random.default_rng(1)
    B, L = len(LENGTHS), max(LENGTHS)
    tokens = rng.integers(2, V, size=(B, L))
    mask = np.arange(L)[None] < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, tokens, 0)
    chosen = {}
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, out, layer=layer: chosen.update({layer: out[2]})
        )
        for layer, module in routers(model).items()
    ]
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    logits = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    out = {"tokens": tokens.astype(np.int32), "mask": mask}
    out["logits"] = logits.detach().numpy()[mask]
    for layer, experts in chosen.items():
        rows = experts.reshape(B, L, -1).numpy()[mask]
        out[f"experts/{layer}"] = np.sort(rows, axis=-1).astype(np.int8)
    if family in WITH_GRADIENTS:
        # A plain sum of squares: nothing of a loss has to be matched.
        (logits[torch.tensor(mask)] ** 2).mean().backward()
        out |= {
            f"grad/{name}": p.grad.numpy()
            for name, p in model.named_parameters()
            if ".mlp.gate." in name or ".mlp.experts." in name
        }
    return out


def greedy(model, tokens, torch) -> np.ndarray:
    """64 tokens after a prompt of 9, int32[64]."""
    prompt = torch.tensor(tokens[1:2, : LENGTHS[1]].astype(np.int64))
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
    )
    return made[0, prompt.shape[1] :].numpy().astype(np.int32)


def main() -> None:
    import torch
    import transformers

    for family, (kind, fields) in FAMILIES.items():
        config = getattr(transformers, f"{kind}Config")(**(COMMON | fields))
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
        randomise(model, torch)
        model.tie_weights()
        folder = FIXTURES / family
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        write_tokenizer(folder)
        found = expected(model, family, torch)
        found["greedy"] = greedy(model, found["tokens"], torch)
        np.savez_compressed(folder / "expected.npz", **found)
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{family}: {size / 1e3:.0f} kB, greedy {found['greedy'][:8]}")


if __name__ == "__main__":
    main()
