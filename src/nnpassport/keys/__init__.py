"""Secrets and what is derived of them: contexts, seeds, keys, their files, and chance."""
