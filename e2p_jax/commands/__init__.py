"""One module a command of `e2p`; each defines one function, whose signature and docstring are its flags and help."""
