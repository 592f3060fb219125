"""What bench_loss.py measures: problems, providers of the loss, and their report."""
