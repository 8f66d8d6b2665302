"""Runs of these tests are compared by their arrays and records: no page is drawn of them."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def no_pages() -> Iterator[None]:
    """Leave out ``report.html``; it takes one to two seconds a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.session.write_page", lambda *_: None)
        yield
