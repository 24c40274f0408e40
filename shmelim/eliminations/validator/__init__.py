"""What is the validator's own: its managers, its settings, its directories."""
