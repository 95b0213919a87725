"""Evaluation: student inference, scoring, rollouts, attention statistics, lm-evaluation-harness.

Begin with `evaluate` (answers to the test problems) and `attention_heads` (statistics of attention heads).
"""
