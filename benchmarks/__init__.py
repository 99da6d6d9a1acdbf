"""Timings as code: each module prints JSON lines of ratios measured side by side in one process."""
