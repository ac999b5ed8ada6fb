"""Names of intermediate arrays, for `jax.checkpoint_policies`."""

PRE_ACTIVATIONS = "expert_pre_activations"  # the array that grouped_glu keeps
GROUPED_MATMUL = "grouped_matmul"  # the array that grouped_matmul returns
