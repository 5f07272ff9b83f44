"""Access: API keys, tokens, permissions, and the audit trail."""
