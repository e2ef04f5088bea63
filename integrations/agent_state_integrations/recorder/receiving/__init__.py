"""What comes in: understood, and cleared of secrets."""
