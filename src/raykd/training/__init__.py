"""Training: one LoRA student, from completions to an adapter, with DeepSpeed under Ray Train.

Begin with `trial` (the specification), then `loop` (the training loop), `losses` and `trainer` (Ray Train).
"""
