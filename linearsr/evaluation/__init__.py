"""Models against bicubic and the truth: pairs, metrics, a report. Knows nothing of Ray or S3."""
