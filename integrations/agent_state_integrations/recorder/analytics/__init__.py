"""Analytics of a log: counts, scores, reports."""
