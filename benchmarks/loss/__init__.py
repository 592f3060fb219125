"""The parts of bench_loss.py: problems, providers of the loss, measurements and reports."""
