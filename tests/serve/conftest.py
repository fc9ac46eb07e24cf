"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'personmae[serve]'")

from served import Made, Page, make, service_of, serving


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A gallery with its models; read only."""
    return make(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="session")
def page(made: Made) -> Iterator[Page]:
    """That gallery's page."""
    with serving(service_of(made)) as served:
        yield served
