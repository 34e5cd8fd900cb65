"""The hidden axes of a network: which dimensions of its tensors must move together, and how.

`factors` is the algebra of dimensions, `trace` follows one run of a network with it, `prove` tries
every axis, and `table` is what is left: plain data that needs no network to be read.
"""
