"""Checkpoints that can be trusted: saved atomically while training goes on, fingerprinted, verified when read."""

from llm_jax.checkpoint.fingerprint import differences, fingerprint, fingerprints
from llm_jax.checkpoint.lock import RunLock
from llm_jax.checkpoint.model_folder import save_model, write_model
from llm_jax.checkpoint.new_folder import check_new, making
from llm_jax.checkpoint.reading import inspect, read_state, restore_params, tokenizer_folder
from llm_jax.checkpoint.record import DamagedError, read_meta
from llm_jax.checkpoint.run_folder import (
    append_event,
    find_checkpoint,
    numbered_folders,
    steps_in,
    write_json_atomic,
)
from llm_jax.checkpoint.store import CheckpointConfig, Store

__all__ = [
    "CheckpointConfig",
    "DamagedError",
    "RunLock",
    "Store",
    "append_event",
    "check_new",
    "differences",
    "find_checkpoint",
    "fingerprint",
    "fingerprints",
    "inspect",
    "making",
    "numbered_folders",
    "read_meta",
    "read_state",
    "restore_params",
    "save_model",
    "steps_in",
    "tokenizer_folder",
    "write_json_atomic",
    "write_model",
]
