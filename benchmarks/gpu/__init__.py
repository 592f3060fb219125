"""The rungs (stages) of gpu_check.py, one module each: `run(job)`, in a process of its own."""
