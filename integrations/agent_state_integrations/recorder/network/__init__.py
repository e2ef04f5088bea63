"""The daemon, its clients, and what they say to each other."""
