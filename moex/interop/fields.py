"""The fields of a `config.json`: read by name and type, none overlooked.

A field is read by the function of its family, or stands in `UNUSED` because it changes
nothing that moex computes. Any other is looked at by `Fields.check_rest`.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from moex.config.base import HUGEST, LARGEST, ConfigError, fits, short

# Names of kinds of values in error messages.
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list[int]: "a list of whole numbers",
    list[str]: "a list of strings",
}

# Fields that change no number which moex computes: settings of training, of generation
# (their tokens are read by `tokens.py`), of how a model is stored, and notes.
_UNUSED = """
architectures attention_dropout auto_map aux_loss_alpha bad_words_ids
begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id
diversity_penalty do_sample dtype early_stopping embd_pdrop
encoder_no_repeat_ngram_size eos_token_id ep_size experts_per_token
exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id hidden_dropout id2label initial_context_length initializer_range
is_decoder is_encoder_decoder label2id length_penalty max_length
max_position_embeddings max_sequence_length max_window_layers min_length
model_max_length model_type name_or_path no_repeat_ngram_size num_beam_groups
num_beams num_labels num_mtp_layers num_nextn_predict_layers num_return_sequences
output_attentions output_hidden_states output_router_logits output_scores pad_token_id
prefix pretraining_tp problem_type pruned_heads quantization_config
remove_invalid_values repetition_penalty resid_pdrop return_dict
return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id seq_aux
suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
unk_token_id use_bfloat16 use_cache
"""

# Fields of other families of transformers that change what a layer computes. Neither
# transformers nor moex reads them in a family that does not have them, but a folder
# that says so was trained otherwise.
_ELSEWHERE = """
alibi attention_chunk_size attention_in_bias attention_multiplier attention_out_bias
attention_sink_bias attn_logit_softcapping attn_temperature_tuning clip_qkv
cross_attention_layers embedding_multiplier embedding_scale expert_layer_offset
expert_layer_period final_logit_softcapping hybrid_override_pattern index_head_dim
index_n_heads index_topk interleave_moe_layer_step layer_types logit_scale
logits_scaling mlp_bias mlp_layer_types moe_layers moe_num_shared_experts
no_rope_layer_interval no_rope_layers num_shared_experts num_zero_experts
parallel_attn per_layer_config qk_layernorm qk_norm qkv_bias query_pre_attn_scalar
residual_multiplier rope_interleave rope_local_base_freq rotary_dim rotary_pct
scale_emb shared_expert_intermediate_size sliding_window sliding_window_pattern
swiglu_alpha swiglu_limit use_bias use_parallel_residual use_qk_norm use_qkv_bias
zero_expert_num zero_expert_type
"""

UNUSED, ELSEWHERE = frozenset(_UNUSED.split()), frozenset(_ELSEWHERE.split())


class Fields:
    """The fields of a `config.json`, with one-line errors that name file and field.

    Args:
      where: begins error messages, such as "models/a/config.json".
      values: the fields.
      defaults: what transformers takes where a field is missing.
      aliases: {another name that transformers knows: the name that is read}.
    """

    def __init__(
        self,
        where: str,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        self.where, self.defaults = where, dict(defaults or {})
        self.values, self.read = dict(values), set[str]()
        self.experts = ""  # the field with the number of experts
        for other, name in (aliases or {}).items():
            if other in self.values:
                value = self.values.pop(other)
                if self.values.setdefault(name, value) != value:
                    raise self.refuse(other, value, f"{name} = {self.values[name]!r}")

    def __call__(self, name: str, kind: Any, *, least=None, null: Any = ...) -> Any:
        """The value of a field, or what transformers takes where it is missing.

        Args:
          name: the field's name.
          kind: one of `KINDS`; a whole number is a number too.
          least: smallest number that is allowed.
          null: the value that null stands for; without it null is an error.
        """
        self.read.add(name)
        if name not in self.values and name not in self.defaults:
            near = _near(name, self.values.keys() - self.read)
            raise ConfigError(
                f"{self.where}: has no {name!r}, which its family needs.{near}"
            )
        value: Any = self.values.get(name, self.defaults.get(name))
        if value is None and null is not ...:
            return null
        if least is not None and kind is int:
            allowed = f"a whole number of at least {least}"
        else:
            allowed = KINDS[kind] + ("" if least is None else f" of at least {least}")
        if not fits(value, kind):
            raise self.refuse(name, value, allowed)
        if kind in (int, float):
            if least is not None and value < least:
                raise self.refuse(name, value, allowed)
            large = LARGEST if kind is int else HUGEST
            if value and not 1 / large <= abs(value) <= large:
                raise self.refuse(name, value, f"{allowed} up to {large:g}")
        return float(value) if kind is float else value

    def refuse(self, name: str, value: Any, allowed: str) -> ConfigError:
        """The error for a value that is wrong, or that moex has no counterpart for."""
        return ConfigError(f"{self.where}: {name} = {short(value)}: must be {allowed}.")

    def count(self, name: str, least: int = 1) -> int:
        """The value of a field that must be a whole number of at least `least`."""
        return self(name, int, least=least)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field that is there, is not null and is none of `allowed`."""
        self.read.add(name)
        value = self.values.get(name)
        alike = [a for a in allowed if isinstance(a, bool) == isinstance(value, bool)]
        if value is not None and value not in alike:
            raise self.refuse(
                name, value, f"{' or '.join(map(repr, allowed))}; moex has no other"
            )

    def check_rest(self) -> list[str]:
        """The fields that nobody knows and that transformers does not read either.

        Raises:
          ConfigError: for a field that changes the computation in other families, and
            for one that is named almost as a field that is missing.
        """
        missing = self.read - self.values.keys()
        unknown = []
        for name, value in self.values.items():
            known = name in self.read or name in UNUSED or name.startswith("_")
            if known or value in (None, False, "", [], {}):
                continue
            if name in ELSEWHERE:
                raise ConfigError(
                    f"{self.where}: {name} = {short(value)}: its family has no such "
                    "field in transformers; remove it if the model has none of it."
                )
            if near := _near(name, missing):
                raise ConfigError(
                    f"{self.where}: {name} = {short(value)}: is no field of its family."
                    f"{near}"
                )
            unknown.append(name)
        return unknown


def _near(name: str, others: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a name that is nearly the same, or an empty string."""
    found = difflib.get_close_matches(name, list(others), n=1, cutoff=0.9)
    return f" Did you mean {found[0]!r}?" if found else ""
