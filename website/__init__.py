"""The documentation site: the pages of ``docs/``, and the references that the code writes of itself."""
