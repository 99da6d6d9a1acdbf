"""Commands. Each module is `python -m experiments.NAME --help`."""
