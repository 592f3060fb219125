"""The rungs of gpu_check.py: a module each, whose `run(job)` is called in a process of its own."""
