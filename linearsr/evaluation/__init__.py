"""Compare models with bicubic and the truth: pairs, metrics, a report. Knows nothing of Ray."""
