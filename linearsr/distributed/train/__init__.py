"""Training on a Ray cluster: one stage, its data, its knee, and the stages in order (ESGF)."""
