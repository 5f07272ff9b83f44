"""The embedded engine: its process and its data directory."""
