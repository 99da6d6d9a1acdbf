"""One jitted step, its optimiser and state, checkpoints, and the loop around them."""
