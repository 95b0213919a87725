"""Runtime: the console, signals, errors and Ray metrics of a running process.

Begin with `errors` (what ends a run, and how it is reported) and `console` (status lines and progress bars).
"""
