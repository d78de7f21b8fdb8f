"""One command that proves, measures and trains on a GPU: see __main__.py."""
