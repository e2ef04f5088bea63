"""What was recorded, found again wherever it is."""
