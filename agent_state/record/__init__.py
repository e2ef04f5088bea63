"""What was said, and what it tells: the recorder, its queries and its analytics."""
