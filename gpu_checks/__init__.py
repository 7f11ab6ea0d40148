"""Measurements on one GPU that no test on the CPU can make; `--tiny` tries their code without."""
