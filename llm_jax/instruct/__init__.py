"""What instruction tuning reads, to token ids and loss masks. No jax here, so worker processes start fast.

preference     pairs of a better and a worse answer
"""
