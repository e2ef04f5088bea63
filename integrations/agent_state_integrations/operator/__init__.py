"""Commands for who looks after a state directory: what changes, what is wrong, archives of it."""
