from tests.blank_figures import blank_figures  # noqa: F401
