"""Fast operations, one folder each: `api` checks and chooses, `reference` defines, one file per backend."""
