"""Metrics, one folder each: `scores.py` computes on texts and NumPy arrays, `<name>.py` is the module for `evaluate.load`, `README.md` the card.

Every metric names its protocol, because the same answers score differently under different ones. Shares and ratios are fractions.
"""
