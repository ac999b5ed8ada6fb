"""A small language model with the router of router.py: minutes on a CPU.

moex train --config=config.py --workdir=runs/first
"""

from moex import LM, Attention, Glu, MoE, Segment
from moex.configs import quickstart

from router import Cosine


def get_config():
    """The run config: that of quickstart (data, steps, optimizer), with this model."""
    cfg = quickstart.get_config()
    moe = MoE(num_experts=8, router=Cosine(k=2), experts=Glu(hidden=128))
    cfg.model = LM(
        dim=128,
        attention=Attention(heads=2, qk_norm=True),
        layers=(Segment(pattern=(moe,), repeat=4),),
    )
    return cfg
