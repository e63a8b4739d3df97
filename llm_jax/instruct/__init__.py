"""Conversations to token ids and loss masks. No jax here, so worker processes start fast.

conversations  turns of a role and a text, read from the four formats in use
templates      how a conversation is written, by name: ChatML, Llama, Gemma, Alpaca, Vicuna, plain
rendering      a Jinja template, sandboxed and limited in time, with its answers found
masks          ids, and which of them are targets; text of users never becomes a special token
prepare        the stage: conversations -> token shards with a mask
preference     pairs of a better and a worse answer
self_instruct  from a few tasks to many
"""
