"""The real tools, driven headless; run by ``make transcripts``, outside of CI."""
