"""Views of a run, made from the files in its folder alone: no jax, no model, no network."""
