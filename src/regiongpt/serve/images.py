"""Images of requests: data URIs, uploads kept for a while, and URLs of allowed hosts.

Only the model's pixels are kept, never the file.
"""

import base64
import hashlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from threading import Lock
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from PIL import Image
from torch import Tensor

from regiongpt.errors import DataError
from regiongpt.images import load_image
from regiongpt.serve.errors import ApiError, over
from regiongpt.serve.options import ServeOptions

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FETCH_SECONDS = 10.0
"""Time to fetch an image from a URL."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as the model reads it."""

    id: str  # sha256:HEX of the file
    width: int
    height: int
    bytes: int
    pixels: Tensor  # (1, 3, S, S)


class Pictures:
    """Reads images, and keeps the uploaded ones of each client; threads may share it."""

    def __init__(self, options: ServeOptions, pixels: Callable[[Image.Image], Tensor]) -> None:
        self._options, self._pixels = options, pixels
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, str], tuple[Picture, float]] = OrderedDict()
        self._known: WeakValueDictionary[str, Picture] = WeakValueDictionary()  # any that is still in use

    def find(self, source: str, client: str) -> Picture:
        """The image that a request names.

        Raises:
            ApiError: it is no image, is not kept, is over a limit, or its URL may not be fetched.
        """
        if source.startswith("sha256:"):
            return self.kept(source, client)[0]
        if source.startswith("data:"):
            head, _, coded = source.partition(",")
            try:
                if not head.endswith(";base64"):
                    raise ValueError
                return self.read(base64.b64decode(coded, validate=True))
            except ValueError:
                raise ApiError(400, "expected a data URI such as data:image/png;base64,...", "image") from None
        if source.startswith("https://"):
            return self.read(fetch(source, self._options.allow_urls, self._options.max_bytes))
        raise ApiError(400, "give the image as data:image/...;base64,... or sha256:... of an uploaded one", "image")

    def read(self, data: bytes) -> Picture:
        """The image in the bytes of a file."""
        if len(data) > self._options.max_bytes:
            raise over("max_bytes", self._options.max_bytes, f"the image has {len(data):,} bytes", 413)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        with self._lock:
            known = self._known.get(digest)
        if known is not None:
            return known
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opened = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception as error:  # header parsers raise nearly every built-in exception on broken data
            raise ApiError(400, f"not an image that can be read; send {', '.join(FORMATS)}", "image") from error
        if opened.width * opened.height > self._options.max_pixels:
            got = f"the image has {opened.width} x {opened.height} pixels"
            raise over("max_pixels", self._options.max_pixels, got)
        try:
            photo = load_image(opened)
        except DataError as error:
            raise ApiError(400, str(error).replace("PIL image", "image"), "image") from error
        picture = Picture(digest, photo.width, photo.height, len(data), self._pixels(photo))
        with self._lock:
            return self._known.setdefault(digest, picture)

    def keep(self, data: bytes, client: str) -> tuple[Picture, float]:
        """Read an image and keep it for its client; returns it with the time when it goes."""
        return self._put(self.read(data), client)

    def kept(self, digest: str, client: str, forget: bool = False) -> tuple[Picture, float]:
        """An image kept for a client, from now on as long as a new one, or no longer."""
        with self._lock:
            found = self._kept.pop((client, digest), None)
        if found is None or found[1] < time.time():
            raise ApiError(404, f"no image {digest[:80]} is kept; upload it (again) to /v1/images", "image_not_found")
        return found if forget else self._put(found[0], client)

    def _put(self, picture: Picture, client: str) -> tuple[Picture, float]:
        now = time.time()
        entry = picture, now + self._options.keep_seconds
        with self._lock:
            self._kept[client, picture.id] = entry
            self._kept.move_to_end((client, picture.id))
            while self._kept and (
                len(self._kept) > self._options.keep_images or next(iter(self._kept.values()))[1] < now
            ):
                self._kept.popitem(last=False)
        return entry


# ---------------------------------------------------------------------------------------------------------------------
# URLs


class _Pinned(http.client.HTTPSConnection):
    """A connection to the checked address, even if the name resolves differently later."""

    def __init__(self, host: str, address: str) -> None:
        super().__init__(host, timeout=FETCH_SECONDS)
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


def fetch(url: str, allowed: Sequence[str], most: int) -> bytes:
    """Fetch a file over https from an allowed host with a public address, within a size and a time; no redirects.

    Raises:
        ApiError: the URL is not allowed; it cannot be fetched, is too large or too slow.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
        if port != 443 or parts.username or host not in {each.lower() for each in allowed}:
            raise ApiError(403, f"images of {host[:80]!r} are not fetched; send a data URI", "url_not_allowed")
        with closing(_Pinned(host, public_address(host))) as connection:
            path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
            connection.request("GET", path, headers={"Accept": "image/*"})
            response = connection.getresponse()
            if response.status != 200:
                raise ApiError(400, f"the image's URL answers {response.status}; send a data URI", "image")
            data = bytearray()
            while piece := response.read1(65536):
                data += piece
                if len(data) > most:
                    raise over("max_bytes", most, "the image at the URL is larger", 413)
                if time.monotonic() > deadline:
                    raise ApiError(408, f"the image's URL took over {FETCH_SECONDS:g} s", "max_seconds")
            return bytes(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ApiError(400, f"the image's URL cannot be fetched: {type(error).__name__}", "image") from error


def public_address(host: str) -> str:
    """The address of a host, none of whose addresses is private; ApiError otherwise."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]
    if not found or not all(ipaddress.ip_address(each).is_global for each in found):
        raise ApiError(403, f"{host[:80]!r} has a private address; send a data URI", "url_not_allowed")
    return found[0]
