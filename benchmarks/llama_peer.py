"""llama.cpp for benchmarks: a checkpoint of OLMoE's kind as GGUF files, and decoding.

Needs `gguf` and `llama-cpp-python`, which pip builds from source with cmake. The files
have no tokenizer: tokens are numbers. Where the process dies of an illegal instruction,
in `tinygemm_kernel_amx`, build it without AMX:
CMAKE_ARGS="-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8".
"""

import ctypes
import functools
import json
import pathlib

import numpy as np

FORMS = {"f32": 0, "bf16": 32, "q8_0": 7, "iq4_nl": 25}  # LLAMA_FTYPE of each
ATTENTION = ("q", "k", "v", "o")


def packages():
    """`(llama_cpp, gguf)`, or ValueError where one is missing."""
    try:
        import gguf
        import llama_cpp
    except ImportError as e:
        name = {"llama_cpp": "llama-cpp-python"}.get(e.name, e.name)
        raise ValueError(f"{name} is missing: pip install {name}") from e
    return llama_cpp.llama_cpp, gguf


def write_gguf(source: pathlib.Path, file: pathlib.Path) -> None:
    """Write a checkpoint of OLMoE's kind as a GGUF file of float32.

    Args:
      source: folder that transformers has saved.
      file: to be written.
    """
    from safetensors.numpy import load_file

    _, gguf = packages()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    arrays = {}
    for path in sorted(source.glob("*.safetensors")):
        arrays |= load_file(path)
    out = gguf.GGUFWriter(file, "olmoe")
    out.add_block_count(config["num_hidden_layers"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_expert_count(config["num_experts"])
    out.add_expert_used_count(config["num_experts_per_tok"])
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("none")
    for name, own in names(config["num_hidden_layers"]).items():
        out.add_tensor(f"{name}.weight", arrays[f"{own}.weight"])
    for i in range(config["num_hidden_layers"]):
        for part in ("gate", "up", "down"):
            own = f"model.layers.{i}.mlp.experts"
            each = (
                f"{own}.{e}.{part}_proj.weight" for e in range(config["num_experts"])
            )
            whole = np.stack([arrays[name] for name in each])
            out.add_tensor(f"blk.{i}.ffn_{part}_exps.weight", whole)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def names(layers: int) -> dict[str, str]:
    """The names of weights in GGUF, and those in transformers, but for experts."""
    found = {"token_embd": "model.embed_tokens", "output": "lm_head"}
    found["output_norm"] = "model.norm"
    for i in range(layers):
        new, old = f"blk.{i}", f"model.layers.{i}"
        found[f"{new}.attn_norm"] = f"{old}.input_layernorm"
        found[f"{new}.ffn_norm"] = f"{old}.post_attention_layernorm"
        found[f"{new}.ffn_gate_inp"] = f"{old}.mlp.gate"
        for part in ATTENTION:
            ours = "output" if part == "o" else part
            found[f"{new}.attn_{ours}"] = f"{old}.self_attn.{part}_proj"
        for part in ("q", "k"):
            found[f"{new}.attn_{part}_norm"] = f"{old}.self_attn.{part}_norm"
    return found


def quantised(file: pathlib.Path, form: str) -> pathlib.Path:
    """Write a GGUF file in one of FORMS beside `file`, by llama.cpp itself."""
    if form == "f32":
        return file
    lib, _ = packages()
    lib.llama_log_set(_silence(lib), None)
    params = lib.llama_model_quantize_default_params()
    params.ftype = FORMS[form]
    made = file.with_suffix(f".{form}.gguf")
    if made.exists():
        return made
    failed = lib.llama_model_quantize(
        str(file).encode(), str(made).encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError(f"llama.cpp could not write {made}: error {failed}.")
    return made


class Decoder:
    """Greedy decoding of several rows by llama.cpp."""

    def __init__(self, file: pathlib.Path, batch: int, slots: int, threads: int):
        """Load a model.

        Args:
          file: of GGUF.
          batch: number of rows.
          slots: most tokens of a row.
          threads: of llama.cpp.
        """
        self.lib, _ = packages()
        self.lib.llama_log_set(_silence(self.lib), None)
        how = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(str(file).encode(), how)
        params = self.lib.llama_context_default_params()
        slots = -(-slots // 256) * 256
        params.n_ctx, params.n_seq_max = slots * batch, batch
        params.n_batch = params.n_ubatch = slots * batch
        params.n_threads = params.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not open {file}.")
        vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab = self.lib.llama_vocab_n_tokens(vocab)
        self.batch = self.lib.llama_batch_init(slots * batch, 0, 1)

    def close(self) -> None:
        """Give its memory back."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def run(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Continue prompts of equal length by `new` tokens each."""
        memory = self.lib.llama_get_memory(self.context)
        self.lib.llama_memory_clear(memory, True)
        rows, made = prompts, [[] for _ in prompts]
        for step in range(new):
            first = 0 if step == 0 else len(prompts[0]) + step - 1
            tokens = self._step(rows, first)
            rows = [[token] for token in tokens]
            for own, token in zip(made, tokens, strict=True):
                own.append(token)
        return made

    def _step(self, rows: list[list[int]], first: int) -> list[int]:
        """Read tokens of each row from position `first` on; return the next ones."""
        batch, last, at = self.batch, [], 0
        for r, row in enumerate(rows):
            for i, token in enumerate(row):
                batch.token[at], batch.pos[at] = token, first + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, r
                batch.logits[at] = i == len(row) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if failed := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp could not decode: error {failed}.")
        found = (self.lib.llama_get_logits_ith(self.context, i) for i in last)
        shape = (self.vocab,)
        return [int(np.ctypeslib.as_array(f, shape).argmax()) for f in found]


@functools.cache  # it lives as long as the library may call it
def _silence(lib):
    return lib.llama_log_callback(lambda level, text, data: None)
