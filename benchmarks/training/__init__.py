"""What bench_kd.py measures: tasks by the trainer itself, their gauge and their report."""
