"""Instruction data and what is trained on it. No jax here, so worker processes start fast.

preference     pairs of a better and a worse answer
self_instruct  from a few tasks to many
"""
