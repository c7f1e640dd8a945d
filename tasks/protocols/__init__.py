"""Protocols as code: what is chosen on which split, what is trained on, how often the test split is looked at."""
