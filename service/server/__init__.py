"""The HTTP connections."""
