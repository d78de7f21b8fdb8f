"""Everything that runs on a Ray cluster. Core modules never import this package."""

try:
    import pyarrow  # noqa: F401
    import ray  # noqa: F401
except ImportError as error:
    raise ImportError("linearsr.cluster needs Ray: pip install 'linearsr[cluster]'") from error
