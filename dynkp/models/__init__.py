"""Models: loading, saving, adapters and fingerprints."""
