"""Resumable requests to OpenAI-compatible chat servers."""
