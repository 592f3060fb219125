"""The parts of bench_kd.py: tasks that run the trainer, their gauge and their report."""
