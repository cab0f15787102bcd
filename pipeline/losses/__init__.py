"""Training losses: one file each, by name in the table of `pipeline.losses.registry`."""
