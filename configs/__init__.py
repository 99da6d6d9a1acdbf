"""Settings of runs. Each file's docstring holds its command and what it should reach."""
