"""A guide, liaison agents, and the workflows behind them, in a chat that survives ``kill -9``."""
