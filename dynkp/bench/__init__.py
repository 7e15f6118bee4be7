"""The ratios of every method against its reference (`dynkp bench`)."""
