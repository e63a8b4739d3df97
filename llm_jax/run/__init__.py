"""The commands: `llm-jax VERB`, or `python -m llm_jax.run.VERB`. Nothing outside run/ imports this."""
