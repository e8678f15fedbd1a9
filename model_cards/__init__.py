"""Checkpoints that come with the package, as complete Hub folders."""
