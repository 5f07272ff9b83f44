"""The rules of conversations: messages in order, once, whole. By key, for all tenants, without HTTP."""
