"""Images of requests: data URIs, uploads kept for a while (as the model reads them), and URLs of allowed hosts."""

import base64
import hashlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from threading import Lock
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from PIL import Image
from torch import Tensor

from regiongpt.errors import DataError
from regiongpt.images import load_image
from regiongpt.serve.guard import ApiError, over
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
    pixels: Tensor  # (1, 3, S, S)
    photo: Image.Image | None  # for a second look


class Pictures:
    """Reads images with the model's ``processor``, and keeps the uploaded ones of each client; threads may share it."""

    def __init__(self, options: ServeOptions, processor: Any) -> None:
        self._options, self._processor = options, processor
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, str], tuple[Picture, float]] = OrderedDict()
        self._known: WeakValueDictionary[str, Picture] = WeakValueDictionary()  # any that is still in use

    def find(self, source: str, client: str) -> Picture:
        """The image that a request names.

        Raises:
            ApiError: it is no image, is not kept, is over a limit, or its URL may not be fetched.
        """
        if source.startswith("sha256:"):
            with self._lock:
                picture, expires = self._kept.get((client, source), (None, 0.0))
            if picture is None or expires < time.time():
                raise ApiError(404, f"no image {source[:80]} is kept; upload it to /v1/images", "image_not_found")
            self.keep(picture, client)
            return picture
        if source.startswith("https://"):
            return self.read(fetch(source, self._options.allow_urls, self._options.max_bytes))
        head, _, coded = source.partition(",")
        try:
            if not (head.startswith("data:") and head.endswith(";base64")):
                raise ValueError
            data = base64.b64decode(coded, validate=True)
        except ValueError:
            raise ApiError(400, "give an image as data:image/...;base64,... or an upload's id", "image") from None
        return self.read(data)

    def read(self, data: bytes) -> Picture:
        """The image in the bytes of a file, which are not too many."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        with self._lock:
            if known := self._known.get(digest):
                return known
        try:
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
        kept, pixels = photo if self._options.detail == "careful" else None, self._processor.pixels_of(photo)
        picture = Picture(digest, photo.width, photo.height, pixels, kept)
        with self._lock:
            return self._known.setdefault(digest, picture)

    def keep(self, picture: Picture, client: str) -> float:
        """Keep an image for its client; returns the time when it goes."""
        now = time.time()
        with self._lock:
            self._kept[client, picture.id] = picture, now + self._options.keep_seconds
            self._kept.move_to_end((client, picture.id))
            while self._kept and (
                len(self._kept) > self._options.keep_images or next(iter(self._kept.values()))[1] < now
            ):
                self._kept.popitem(last=False)
        return now + self._options.keep_seconds


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
        # This address, even if the name resolves differently later.
        plain = socket.create_connection((public_address(host), 443), FETCH_SECONDS)
        with closing(http.client.HTTPConnection(host)) as connection:
            connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
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
