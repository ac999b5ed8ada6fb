"""moex: a research training framework for mixture-of-experts models."""
