"""Preparing a run whose lease is given back at once: for tests of what is checked before it."""

from pipeline.driver import preflight


def prepare(config, *, world_size):
    with preflight.prepare(config, world_size=world_size) as prepared:
        return prepared
