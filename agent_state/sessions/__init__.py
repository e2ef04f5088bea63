"""People's sessions: their conversations, the workflows behind them, the way they went."""
