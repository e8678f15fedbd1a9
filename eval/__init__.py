"""Evaluation on ScanQA, SQA3D, ScanRefer, Scan2Cap and reconstruction: metrics, baselines, and the run that ties them together."""
