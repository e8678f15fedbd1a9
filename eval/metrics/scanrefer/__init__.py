"""ScanRefer: share of boxes above an overlap."""
