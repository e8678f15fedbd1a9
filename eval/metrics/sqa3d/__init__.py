"""SQA3D: exact match of answers, and LEO's refined match."""
