"""Point clouds: accuracy, completeness, normal consistency, F-score."""
