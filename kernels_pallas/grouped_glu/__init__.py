"""Gated experts through a routing plan. The public function is in `api`."""
