"""Mirror of the downloads of Triton's build: Python imports it at its start as `sitecustomize`.

Each https:// address is opened below TRITON_DOWNLOADS_MIRROR, the address of a server or of a
folder. A folder may also hold the files side by side.
"""

import os
import urllib.request
from typing import Any
from urllib.parse import unquote, urlsplit

VARIABLE = "TRITON_DOWNLOADS_MIRROR"


class Mirror(urllib.request.HTTPSHandler):
    """Handler of https:// addresses that opens the same file of the mirror."""

    def https_open(self, req: urllib.request.Request) -> Any:
        mirror = os.environ[VARIABLE].rstrip("/")
        address = f"{mirror}/{req.full_url.partition('://')[2]}"
        if mirror.startswith("file:") and not os.path.isfile(unquote(urlsplit(address).path)):
            address = f"{mirror}/{address.rpartition('/')[2]}"
        # An opener of its own: the mirror may be an https:// address, or redirect to one.
        plain = urllib.request.build_opener()
        request = urllib.request.Request(address, headers=req.headers)
        answer = plain.open(request, timeout=req.timeout)
        # A file has no status, and urllib requires one of each answer to an https:// request.
        answer.code, answer.msg = answer.code or 200, "OK"
        return answer


if VARIABLE in os.environ:
    urllib.request.install_opener(urllib.request.build_opener(Mirror))
