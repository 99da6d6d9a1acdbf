"""What a sweep came to, as figures and pages."""
