"""A campaign of random disturbances: `python -m tests.campaign --minutes N`.

Every stage draws its cases from a seed and the case's number, runs each in a forked child, and
holds the package to its promise: a typed error that names a file, or the right content.
"""
