"""Rationales and judgements from a large model behind an OpenAI-compatible chat server."""
