"""ScanQA: exact match of answers."""
