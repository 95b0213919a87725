"""Runtime: console output, signals and Ray metrics of a running process.

Begin with `console` (status lines, progress bars and the log file).
"""
