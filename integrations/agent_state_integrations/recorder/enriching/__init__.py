"""What a message is about, by rules."""
