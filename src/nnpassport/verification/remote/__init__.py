"""Black-box verification of a service that returns only predictions.

`services.py` says how each protocol asks and answers, `asking.py` sends one question warily,
`rehearsal.py` asks about innocent pictures first, `journal.py` keeps the answers, and `probe.py`
hides the triggers among ordinary images and judges.
"""
