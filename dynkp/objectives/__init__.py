"""The papers' equations, as pure tensor functions."""
