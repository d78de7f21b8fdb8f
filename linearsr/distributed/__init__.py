"""Everything that runs on a Ray cluster. Core modules never import this package."""

from linearsr.errors import require

require("data", "ray", "pyarrow", "boto3")
