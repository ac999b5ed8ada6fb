"""One script per figure. Each runs as a process of the command `moex` would."""

from moex import keep_memory

keep_memory()  # before a script makes its first array
