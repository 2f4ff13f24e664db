"""Published code with our neurons in place of its own: ``python -m conformance --help``."""
