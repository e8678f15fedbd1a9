"""Procedural rooms: furnished, filmed, described, and written in the file formats of ScanNet and its language benchmarks."""
