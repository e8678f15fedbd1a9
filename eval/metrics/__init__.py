"""Metrics, one folder each: `scores.py` computes with NumPy, `<name>.py` is the module for `evaluate.load`.

Every metric names its protocol, because the same answers score differently under different ones. Shares and ratios are fractions.
"""
