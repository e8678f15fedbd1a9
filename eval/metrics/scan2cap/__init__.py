"""Scan2Cap: captions of objects at a place."""
