"""Functions and classes that several test modules or conftest files share."""
