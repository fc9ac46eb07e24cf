"""What the tests of this folder share."""

from made_runs import make_run  # noqa: F401 - a fixture
