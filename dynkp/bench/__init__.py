"""The ratios of docs/performance.md: each method timed in one process, in turn with what it is compared with."""
