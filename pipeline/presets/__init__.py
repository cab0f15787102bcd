"""Named runs as functions; the command line changes values, never structure."""
