"""Errors of the metric scale and of the room frame."""
