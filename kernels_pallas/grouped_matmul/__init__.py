"""One matmul per group of rows. The public function is in `api`."""
