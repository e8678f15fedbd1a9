"""Errors of depth maps under several alignments."""
