"""Functions and classes that several test modules or conftest files share."""

import pytest

# Failures of the assertions in helpers show their values, as those in tests do.
pytest.register_assert_rewrite(__name__)
