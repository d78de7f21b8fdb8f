"""Ray's provider of raylets as the autoscaler's machines, with a folder for each raylet.

The autoscaler's process loads this module.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Raylets(FakeMultiNodeProvider):  # type: ignore[misc]
    """`folder` of the provider's config is the parent of the raylets' folders."""

    def _create_node_with_resources_and_labels(self, *node: Any) -> None:
        """Give the node a folder of its own: in a shared one, a new node would unpack a job's files
        over those that other nodes use."""
        own = tempfile.mkdtemp(prefix="n", dir=self.provider_config["folder"])
        params = partial(parameter.RayParams, temp_dir=own)
        # The autoscaler creates several at once, in threads.
        with self.lock, mock.patch.object(parameter, "RayParams", params):
            super()._create_node_with_resources_and_labels(*node)
