"""Raylets as the autoscaler's machines: Ray's own provider for that, with a folder for each.

Loaded by the autoscaler's process.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Raylets(FakeMultiNodeProvider):  # type: ignore[misc]
    """`folder` of the provider's config: where the machines' own folders lie."""

    def _create_node_with_resources_and_labels(self, *node: Any) -> None:
        """In one folder for all, a new node unpacks a job's files over those others work in."""
        own = tempfile.mkdtemp(prefix="n", dir=self.provider_config["folder"])
        params = partial(parameter.RayParams, temp_dir=own)
        # The autoscaler creates several at once, in threads.
        with self.lock, mock.patch.object(parameter, "RayParams", params):
            super()._create_node_with_resources_and_labels(*node)
