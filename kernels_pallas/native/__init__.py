"""The C code of the CPU's experts: compiled here, on first use, for this processor."""
