"""Names of intermediate arrays, for `jax.checkpoint_policies`."""

PRE_ACTIVATIONS = "expert_pre_activations"  # what grouped_glu keeps
GROUPED_MATMUL = "grouped_matmul"  # what grouped_matmul returns
