"""As much of HTTP/1.1 as is needed here: what a request may look like, and who may make one. No sockets here."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qs

from zsfl.errors import ZsflError

MAX_HEAD_BYTES = 16 << 10
"""Request line and headers together; browsers send under two thousand."""
MAX_HEADERS = 64
REASONS = {
    200: "OK",
    303: "See Other",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    421: "Misdirected Request",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
_LINE = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/([0-9])\.([0-9])")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\x20-\x7e\x80-\xff\t]*)")
"""Blanks around the value are in it: to tell them apart in all ways takes the cube of their number where none fits."""


class HttpError(ZsflError):
    """A request that gets no page; the message is what its sender is told."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request(NamedTuple):
    """What somebody asks for."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """By lower-case name."""

    def cookie(self, name: str) -> str:
        """The value of a cookie; empty where there is none."""
        for part in self.headers.get("cookie", "").split(";"):
            key, _, value = part.strip().partition("=")
            if key == name:
                return value
        return ""

    @property
    def bearer(self) -> str:
        """The token that programs send; empty where there is none."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""


def parse(head: bytes) -> Request:
    """The request in `head`, the empty line at its end included; HttpError says what is wrong with it."""
    line, *rest = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    found = _LINE.fullmatch(line)
    if found is None:
        raise HttpError(400, "this is no HTTP request: expected GET /path HTTP/1.1")
    if found[3] != b"1":
        raise HttpError(505, "HTTP/1.1 is spoken here")
    if len(rest) > MAX_HEADERS:
        raise HttpError(431, f"more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for one in rest:
        parts = _HEADER.fullmatch(one)
        name = parts[1].decode("ascii").lower() if parts else ""
        if parts is None or (name in headers and name in ("host", "content-length", "transfer-encoding")):
            raise HttpError(400, "a header is malformed, or there twice")
        headers[name] = parts[2].strip(b" \t").decode("latin-1")
    method = found[1].decode("ascii")
    if method not in ("GET", "HEAD"):
        raise HttpError(405, "there is nothing here to change: use GET")
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise HttpError(400, "a request here has no body")
    path, _, query = found[2].decode("ascii").partition("?")
    try:
        fields = {name: values[-1] for name, values in parse_qs(query, max_num_fields=8).items()}
    except ValueError:
        raise HttpError(400, "more than 8 fields in the query") from None
    return Request(method, path, fields, headers)


class Gate:
    """Who may see what is served: on loopback whoever asks this machine for it, elsewhere whoever has the token."""

    def __init__(self, host: str, port: int, token: str, whose: str) -> None:
        """`token` is empty on loopback; `whose` is what those are told who come without it."""
        self._whose = whose
        self._names = {f"{name}:{port}" for name in (host, "localhost", "127.0.0.1")}
        self._names |= {name.removesuffix(":80") for name in self._names} if port == 80 else set()
        self._token = token
        self.cookie = f"zsfl-dash-{port}"
        """Cookies know no ports, and there may be several of these pages on one machine."""

    def check(self, request: Request) -> None:
        """HttpError for whoever may not."""
        host = request.headers.get("host", "")
        if not self._token and host.lower() not in self._names:
            # A page of the world whose name was made to mean 127.0.0.1 would else read everything here.
            raise HttpError(421, "ask for this by the address that was printed when it began")
        origin = request.headers.get("origin", "")
        if origin and origin.lower() != f"http://{host.lower()}":
            raise HttpError(403, "pages from elsewhere may not read this")
        if request.path != "/" and request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise HttpError(403, "pages from elsewhere may not read this")
        given = (request.query.get("token", ""), request.cookie(self.cookie), request.bearer)
        if self._token and not any(map(self._fits, given)):
            raise HttpError(401, self._whose)

    def has_token(self, request: Request) -> bool:
        """Whether the token is in the request's query."""
        return bool(self._token) and self._fits(request.query.get("token", ""))

    def _fits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())

    def set_cookie(self) -> str:
        """The header that lets a browser keep the token."""
        return f"{self.cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"


def head_of(status: int, headers: Mapping[str, str]) -> bytes:
    """The head of a reply, after which the connection is closed."""
    always = {
        "Cache-Control": "no-store",
        "Connection": "close",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        *(f"{name}: {value}" for name, value in {**always, **headers}.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
