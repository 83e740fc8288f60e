"""Other steering libraries on the same model and pairs, each run by the interpreter of its own environment."""
