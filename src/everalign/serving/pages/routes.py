"""All pages of a gateway."""

from pathlib import Path

from fastapi import APIRouter

from everalign.serving.auth import Keys
from everalign.serving.gateway import Gateway
from everalign.serving.pages.dashboard import dashboard_routes
from everalign.serving.pages.playground import playground_routes
from everalign.serving.pages.rendering import Pages
from everalign.serving.pages.signing_in import signing_routes
from everalign.serving.sessions import Sessions


def page_routes(gateway: Gateway, keys: Keys, sessions: Sessions, run: Path | None) -> APIRouter:
    """Return the routes.

    Args:
        gateway: answers.
        keys: one of which opens the pages; with none, they are open to this machine.
        sessions: of browsers that have signed in.
        run: that the corrector comes from; None where it comes from none.
    """
    router, pages = APIRouter(include_in_schema=False), Pages(sessions, keys.needed)
    router.include_router(playground_routes(gateway, pages))
    router.include_router(dashboard_routes(gateway, pages, run))
    router.include_router(signing_routes(pages, keys))
    return router
