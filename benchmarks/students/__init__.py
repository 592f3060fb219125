"""The measurements of labels.py: cells, their teachers and data, trials, tables."""
