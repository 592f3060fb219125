"""What all benchmarks share: commands, machines, worker processes, memory, times, tables."""
