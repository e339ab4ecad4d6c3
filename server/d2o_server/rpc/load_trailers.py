"""The server's load, in the trailers of every call of the inference service: for those who balance by it."""

from __future__ import annotations

from d2o_server.engine.types import Load

PAGES_TOTAL, PAGES_FREE = "d2o-pages-total", "d2o-pages-free"
REQUESTS_RUNNING, REQUESTS_WAITING = "d2o-requests-running", "d2o-requests-waiting"


def load_trailers(load: Load) -> tuple[tuple[str, str], ...]:
    """Whole numbers by key. Pages of the call that ends may still count as held: they come back within a step."""
    return (
        (PAGES_TOTAL, str(load.pages_total)),
        (PAGES_FREE, str(load.pages_free)),
        (REQUESTS_RUNNING, str(load.running)),
        (REQUESTS_WAITING, str(load.waiting)),
    )
