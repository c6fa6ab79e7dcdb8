"""The commands of `e2p`, by what they are for: each a function whose signature and docstring are its flags and help."""
