"""Benchmarks: programs that load a server of their own and print figures with ratios. Not part of the package."""
