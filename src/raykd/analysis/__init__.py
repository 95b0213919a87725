"""Analysis: scores, statistics, comparisons and attention effects, computed with numpy from rows.

Begin with `scores` (one student) and `comparison` (one arm against another).
"""
