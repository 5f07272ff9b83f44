"""Bytes and shapes: JSON, BSON and OpenAI's items, in pure functions."""
