"""Work that runs by itself, or for an operator."""
