"""The HTTP API: parse, one call of the service, shape the answer."""
