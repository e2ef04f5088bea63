"""What a log tells: counts, scores, reports."""
