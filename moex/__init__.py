"""moex: a research training framework for mixture-of-experts models."""

from moex.allocator import keep_memory

__all__ = ["keep_memory"]
