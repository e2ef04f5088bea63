"""The recording daemon, its clients, and their protocol."""
