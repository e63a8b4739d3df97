"""How good a model is on text it has not seen, and what needs no model at all reaches there."""
