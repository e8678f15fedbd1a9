"""Relative and absolute errors of camera poses."""
