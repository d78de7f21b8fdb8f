"""Everything that runs on a Ray cluster. Core modules never import this package."""
