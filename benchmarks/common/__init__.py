"""Shared by all benchmarks: commands, machines, worker processes, memory, times, tables."""
