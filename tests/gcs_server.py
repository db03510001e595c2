"""A Google Cloud Storage server on loopback for tests: the part of its JSON API that tlm uses.

Uploads (media, multipart, resumable), reads with ranges and generation headers, listings with
prefix, delimiter, offsets and pages, deletions, copies, moves, and preconditions on generations:
what gcsfs and TensorStore's driver ask for. Faults are injected by `Server.fault`.

    python tests/gcs_server.py [SECONDS]     serves until it is killed, each answer so late;
                                             prints its address
"""

import base64
import dataclasses
import datetime
import hashlib
import http.server
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import google_crc32c

PAGE = 1000
# A status to answer instead, "drop" to close the connection, or "hang" to answer after `HANG`.
Fault = int | str | None
HANG = 30.0


@dataclasses.dataclass
class Stored:
    """An object in a bucket."""

    data: bytes
    generation: int
    updated: str
    content_type: str


class Server(http.server.ThreadingHTTPServer):
    """Serves from construction until `close`."""

    daemon_threads = True
    request_queue_size = 256
    scheme = "gs"

    def __init__(self, *buckets: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.buckets: dict[str, dict[str, Stored]] = {bucket: {} for bucket in buckets}
        self.fault: Callable[[str, str], Fault] = lambda method, path: None
        """Called with the method and path of each request; the path of an upload has a name."""
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.uploads: dict[str, dict[str, Any]] = {}
        self.clock = time.time_ns() // 1000
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point gcsfs and TensorStore at this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anything",
        }

    def names(self, prefix: str = "", bucket: str = "bucket") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def read(self, name: str, bucket: str = "bucket") -> bytes:
        return self.buckets[bucket][name].data

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Answer(Exception):
    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _serve(self) -> None:
        body = self._body()
        path, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        shown = urllib.parse.unquote(self.path)
        if self.query.get("uploadType") == "multipart":
            shown += f"&name={_parts(self.headers['Content-Type'], body)[0]['name']}"
        self.server.requests.append((self.command, shown))
        fault = self.server.fault(self.command, shown)
        try:
            if fault == "hang":
                time.sleep(HANG)
            if fault == "drop":
                self.close_connection = True
                return
            if isinstance(fault, int):
                raise _Answer(fault, "injected")
            with self.server.lock:
                self._route(path, body)
        except _Answer as answer:
            error = {"error": {"code": answer.status, "message": str(answer)}}
            self._send(json.dumps(error).encode(), status=answer.status)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(
        self,
        body: bytes,
        *,
        status: int = 200,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(body)

    def _route(self, path: str, body: bytes) -> None:
        path = path.removeprefix("/download")
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            self._upload(*map(urllib.parse.unquote, found.groups()), body)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            self._bucket(found[1])
            self._send(json.dumps({"name": found[1], "kind": "storage#bucket"}).encode())
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            self._list(found[1])
        elif found := re.fullmatch(
            r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", path
        ):
            self._copy(*map(urllib.parse.unquote, found.groups()))
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path):
            bucket, old, new = map(urllib.parse.unquote, found.groups())
            self._copy(bucket, old, bucket, new)
            del self.server.buckets[bucket][old]
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/compose", path):
            bucket, name = map(urllib.parse.unquote, found.groups())
            sources = [s["name"] for s in json.loads(body)["sourceObjects"]]
            data = b"".join(self._object(bucket, source).data for source in sources)
            self._send(json.dumps(self._put(bucket, name, data, "")).encode())
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)", path):
            self._one(*map(urllib.parse.unquote, found.groups()))
        else:
            raise _Answer(404, f"no such method: {self.command} {path}")

    def _bucket(self, name: str) -> dict[str, Stored]:
        if name not in self.server.buckets:
            raise _Answer(404, "The specified bucket does not exist.")
        return self.server.buckets[name]

    def _object(self, bucket: str, name: str) -> Stored:
        found = self._bucket(bucket).get(name)
        if found is None:
            raise _Answer(404, f"No such object: {bucket}/{name}")
        return found

    def _preconditions(self, found: Stored | None) -> None:
        generation = 0 if found is None else found.generation
        wanted = self.query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != generation:
            raise _Answer(412, "At least one of the pre-conditions you specified did not hold.")
        unwanted = self.query.get("ifGenerationNotMatch")
        if unwanted is not None and int(unwanted) == generation:
            raise _Answer(304 if self.command == "GET" else 412, "not modified")

    def _about(self, bucket: str, name: str, stored: Stored) -> dict[str, Any]:
        crc = google_crc32c.value(stored.data).to_bytes(4, "big")
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(stored.data)),
            "generation": str(stored.generation),
            "metageneration": "1",
            "updated": stored.updated,
            "timeCreated": stored.updated,
            "contentType": stored.content_type,
            "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
            "crc32c": base64.b64encode(crc).decode(),
        }

    def _put(self, bucket: str, name: str, data: bytes, content_type: str) -> dict[str, Any]:
        objects = self._bucket(bucket)
        self._preconditions(objects.get(name))
        self.server.clock = max(self.server.clock + 1, time.time_ns() // 1000)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        objects[name] = Stored(
            data=data, generation=self.server.clock, updated=now, content_type=content_type
        )
        return self._about(bucket, name, objects[name])

    def _upload(self, bucket: str, body: bytes) -> None:
        how = self.query["uploadType"]
        if how == "media":
            kind = self.headers.get("Content-Type", "")
            self._send(json.dumps(self._put(bucket, self.query["name"], body, kind)).encode())
        elif how == "multipart":
            about, data = _parts(self.headers["Content-Type"], body)
            self._send(json.dumps(self._put(bucket, about["name"], data, "")).encode())
        elif "upload_id" not in self.query:
            self._bucket(bucket)
            key = f"u{len(self.server.uploads)}"
            name = self.query.get("name") or json.loads(body)["name"]
            self.server.uploads[key] = {"name": name, "data": b""}
            again = urllib.parse.urlencode(self.query | {"upload_id": key})
            place = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?{again}"
            self._send(b"", headers={"Location": place})
        else:
            self._resume(bucket, self.server.uploads[self.query["upload_id"]], body)

    def _resume(self, bucket: str, upload: dict[str, Any], body: bytes) -> None:
        if self.command == "DELETE":
            raise _Answer(499, "cancelled")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", self.headers.get("Content-Range", ""))
        if found:
            upload["data"] = upload["data"][: int(found[1])] + body
            total = len(upload["data"]) if found[2] == "*" else int(found[2])
            whole = found[2] != "*" and len(upload["data"]) == total
        else:
            upload["data"], whole = upload["data"] + body, True
        if whole:
            about = self._put(bucket, upload["name"], upload["data"], "")
            self._send(json.dumps(about).encode())
        else:
            self._send(b"", status=308, headers={"Range": f"bytes=0-{len(upload['data']) - 1}"})

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset", "")
        after = self.query.get("pageToken", "")
        most = min(int(self.query.get("maxResults", PAGE)), PAGE)
        items, prefixes, last = [], [], ""
        for name, stored in sorted(self._bucket(bucket).items()):
            inside = name.startswith(prefix) and name >= first and (not end or name < end)
            rest = name[len(prefix) :]
            folder = prefix + rest.partition(delimiter)[0] + delimiter if delimiter else ""
            is_folder = bool(delimiter) and delimiter in rest
            place = folder if is_folder else name
            if not inside or place <= after or (is_folder and folder in prefixes):
                continue
            if len(items) + len(prefixes) == most:
                break
            last = place
            if is_folder:
                prefixes.append(folder)
            else:
                items.append(self._about(bucket, name, stored))
        else:
            last = ""
        answer: dict[str, Any] = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        if last:
            answer["nextPageToken"] = last
        self._send(json.dumps(answer).encode())

    def _copy(self, bucket: str, name: str, to_bucket: str, to_name: str) -> None:
        stored = self._object(bucket, name)
        about = self._put(to_bucket, to_name, stored.data, stored.content_type)
        self._send(json.dumps({"done": True, "resource": about, **about}).encode())

    def _one(self, bucket: str, name: str) -> None:
        stored = self._object(bucket, name)
        self._preconditions(stored)
        if self.command == "DELETE":
            del self.server.buckets[bucket][name]
            self._send(b"", status=204)
        elif self.query.get("alt") == "media":
            self._media(stored)
        else:
            self._send(json.dumps(self._about(bucket, name, stored)).encode())

    def _media(self, stored: Stored) -> None:
        crc = google_crc32c.value(stored.data).to_bytes(4, "big")
        headers = {
            "x-goog-generation": str(stored.generation),
            "x-goog-metageneration": "1",
            "x-goog-stored-content-length": str(len(stored.data)),
            "x-goog-hash": f"crc32c={base64.b64encode(crc).decode()}",
        }
        data, status, size = stored.data, 200, len(stored.data)
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            end = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
            if first >= size:
                raise _Answer(416, "The requested range cannot be satisfied.")
            data, status = data[first:end], 206
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        self._send(data, status=status, kind="application/octet-stream", headers=headers)


def _parts(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """(metadata, data) of a multipart upload."""
    found = re.search(r'boundary="?([^";]+)', content_type)
    assert found, content_type
    mark = b"--" + found[1].encode()
    first, rest = body.split(mark, 2)[1:]
    about = json.loads(re.split(rb"\r?\n\r?\n", first, maxsplit=1)[1])
    data = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1]
    data = data[: data.rindex(mark)]
    return about, data[: -2 if data.endswith(b"\r\n") else -1]


if __name__ == "__main__":
    served = Server("bucket")
    if late := float((*sys.argv[1:], "0")[0]):
        served.fault = lambda method, path: time.sleep(late)  # type: ignore[func-returns-value]
    print(served.url, flush=True)
    threading.Event().wait()
