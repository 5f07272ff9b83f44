"""OpenAI's Conversations API, below `/v1`."""
