"""Training from the command line: options, data, the run and its closing table."""
