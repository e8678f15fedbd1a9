"""VSI-Bench's scores of answers about spaces."""
