"""Segments become archives; nothing goes before its archive has been read back."""
