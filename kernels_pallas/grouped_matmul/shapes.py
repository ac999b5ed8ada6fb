"""Named layer shapes, used by tests and benchmarks alike.

`REAL` are layers of published models or of published measurements; `AWKWARD` are
small ones that kernels easily get wrong.
"""

from typing import NamedTuple


class LayerShape(NamedTuple):
    """Sizes of one expert layer: T, K, D, F, E."""

    tokens: int
    k: int
    dim: int
    hidden: int
    num_experts: int


REAL = {
    "cpu_small": LayerShape(1024, 2, 256, 512, 8),
    "cpu": LayerShape(4096, 2, 256, 512, 8),
    "cpu_fine": LayerShape(4096, 2, 256, 512, 64),
    "cpu_finest": LayerShape(4096, 2, 256, 512, 128),
    "cpu_wide": LayerShape(4096, 2, 512, 1024, 16),
    "H1": LayerShape(24576, 8, 1536, 256, 128),  # 7b_fine
    "H2": LayerShape(24576, 2, 1536, 1024, 32),  # 7b_coarse
    "H3": LayerShape(40960, 8, 768, 256, 128),  # 1b_fine
    "H4": LayerShape(32768, 16, 4096, 256, 256),  # 30b_extreme
    "H5": LayerShape(32768, 8, 4096, 1024, 128),  # 120b
    "H6": LayerShape(32768, 4, 4096, 2048, 64),  # 120b_coarse
    "H7": LayerShape(32768, 8, 2048, 768, 128),  # qwen3_30b_a3b
    "H8": LayerShape(32768, 10, 2048, 512, 512),  # qwen3_next
    # One of 8 expert-parallel ranks of DeepSeek-V3 sees its rows as tokens.
    "H9": LayerShape(32768, 1, 7168, 2048, 4),  # deepseek_v3_rank
    "H10": LayerShape(2048, 2, 256, 512, 8),  # the CPU case
}

AWKWARD = {
    "prime": LayerShape(37, 2, 5, 7, 5),
    "small": LayerShape(7, 2, 5, 3, 4),
    "one_expert": LayerShape(13, 1, 4, 6, 1),
    "k_is_e": LayerShape(5, 3, 4, 3, 3),
    "one_token": LayerShape(1, 2, 8, 4, 7),
    "more_experts_than_slots": LayerShape(5, 2, 4, 4, 13),
    "full_tiles": LayerShape(101, 1, 4, 3, 7),
}
