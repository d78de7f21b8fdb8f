"""Pictures on disk and in memory: reading, writing, tiling, colour. Knows no model."""
