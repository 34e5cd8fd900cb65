"""The paper's experiments: cells that are run once and kept, tables and figures made of them.

`plans` says how, `contents` what, `cells` and `store` what was done; `grid` runs the rest.
"""
