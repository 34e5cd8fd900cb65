"""A released network in the hands of others: ONNX, a folder for the hub, a signature over it.

The libraries for these are optional, and imported where they are used.
"""
