"""Embedding schemes: each file is one way to put a mark into a network and to read it again."""
