"""Comparisons with other libraries, each in its own environment; `make outside` installs and runs them."""
