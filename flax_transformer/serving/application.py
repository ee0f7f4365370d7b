"""The HTTP application: routes, security headers, and errors in JSON."""

import base64
import hashlib
import importlib.resources
import re
from collections.abc import Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flax_transformer.packaged_font import packaged_font
from flax_transformer.serving import exploring, libretranslate
from flax_transformer.serving.openapi import describe, describe_in_html
from flax_transformer.serving.refusals import Refusal
from flax_transformer.serving.service import Call, Json, Service, Work, error_answer

PAGE = "page.html"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def read_page() -> str:
    """The page that comes with this library."""
    return (importlib.resources.files("flax_transformer.serving") / PAGE).read_text(encoding="utf-8")


def page_policy(page: str) -> str:
    """The Content-Security-Policy of a page: its own styles and scripts, its own server, and nothing else."""
    allowed = {}
    for tag in ("style", "script"):
        digests = [
            base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            for content in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        ]
        allowed[tag] = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (
        f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; "
        "connect-src 'self'; img-src 'self' data:; font-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


class SecurityHeaders:
    """Adds the headers that every answer has, unless the answer has its own."""

    def __init__(self, app: ASGIApp):
        """Takes the application around which it lies."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def make_application(service: Service, *, page: str | None = None, origins: Sequence[str] = ()) -> Starlette:
    """Makes the application.

    Args:
        service: the models and the rules.
        page: the page at "/"; the one of this library if not given.
        origins: the origins whose pages may use the server from a browser (CORS), "*" for all; none if empty.
    """
    page = read_page() if page is None else page
    policy = page_policy(page)

    async def show_page(call: Call) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    async def show_font(call: Call) -> Response:
        path = packaged_font()
        if path is None:
            raise Refusal(404, "this server has no font: install weblate-fonts")
        return FileResponse(path, media_type="font/ttf", headers={"Cache-Control": "public, max-age=604800"})

    async def metrics(call: Call) -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    description = describe(service.limits)
    documentation = describe_in_html(description)

    async def show_spec(call: Call) -> Response:
        return Json(description)

    async def show_documentation(call: Call) -> Response:
        return HTMLResponse(documentation)

    def route(path: str, work: Work, *methods: str, public: bool = False) -> Route:
        async def endpoint(request: Request) -> Response:
            return await service.answer(request, work, public=public)

        return Route(path, endpoint, methods=list(methods))

    routes = [
        route("/", show_page, "GET", public=True),
        route("/font.ttf", show_font, "GET", public=True),
        route("/translate", libretranslate.translate, "POST"),
        route("/detect", libretranslate.detect, "POST"),
        route("/languages", libretranslate.languages, "GET", "POST", public=True),  # argostranslate posts
        route("/health", libretranslate.health, "GET", public=True),
        route("/frontend/settings", libretranslate.settings, "GET", public=True),
        route("/models", exploring.models, "GET", public=True),
        route("/explain", exploring.explain, "POST"),
        route("/attention", exploring.attention, "POST"),
        route("/stream", exploring.stream, "GET", "POST"),
        route("/spec", show_spec, "GET", public=True),
        route("/docs", show_documentation, "GET", public=True),
        route("/metrics", metrics, "GET", public=True),
    ]
    middleware = [Middleware(SecurityHeaders)]
    if origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])
        )
    application = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _not_routed})
    application.router.redirect_slashes = False  # it would send the client to the address that its Host header names
    return application


async def _not_routed(request: Request, error: Any) -> Response:
    """The answer where there is no route, or not for this method."""
    if error.status_code == 405:
        allowed = error.headers.get("Allow", "another method")
        answer = error_answer(Refusal(405, f"{request.method} is not allowed here: use {allowed}"))
        answer.headers["Allow"] = allowed
        return answer
    return error_answer(Refusal(error.status_code, "there is nothing here: GET /docs lists what there is"))
