"""Alternator: PPO-RLHF on DeepSpeed ZeRO."""
