"""A server that stores objects as Google Cloud Storage does, in memory.

As much of its JSON interface as gcsfs and array_record use.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import sys
import threading
import urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers a request; the objects are those of the server."""

  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_GET(self):
    self._log()
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    name = re.search(r"/b/([^/]+)/o/(.+)", url.path)
    if re.fullmatch(r".*/b/[^/]+/o/?", url.path):
      self._list(query)
    elif name is None and "/b/" in url.path:
      self._send(json.dumps({"name": url.path.split("/")[-1]}).encode())
    else:
      key = urllib.parse.unquote(name[2] if name else url.path.split("/", 2)[2])
      content = self.server.objects.get(key)
      if content is None:
        self._send(b'{"error": {"code": 404, "message": "no"}}', 404)
      elif name and query.get("alt") != "media" and "download" not in url.path:
        self._send(json.dumps(self._about(key)).encode())
      else:
        self._send_part(content)

  def do_POST(self):
    if self.path.startswith("/resume/"):
      self.do_PUT()
      return
    self._log()
    body = self.rfile.read(int(self.headers["Content-Length"] or 0))
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
    if query.get("uploadType") == "resumable":
      key = json.loads(body)["name"]
      where = f"http://{self.headers['Host']}/resume/{urllib.parse.quote(key)}"
      self._send(b"{}", headers={"Location": where})
      return
    if query.get("uploadType") == "media":
      key, content = query["name"], body
    else:
      boundary = self.headers["Content-Type"].split("boundary=")[1].strip("\"'")
      _, about, rest = body.split(f"--{boundary}".encode(), 2)
      key = json.loads(about[about.index(b"{") :])["name"]
      content = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1]
      end = content.rindex(f"--{boundary}--".encode())
      content = content[:end].removesuffix(b"\n").removesuffix(b"\r")
    self.server.objects[key] = content
    self._send(json.dumps(self._about(key)).encode())

  def do_PUT(self):
    self._log()
    body = self.rfile.read(int(self.headers["Content-Length"] or 0))
    key = urllib.parse.unquote(self.path.removeprefix("/resume/"))
    done = self.server.parts.setdefault(key, bytearray())
    done += body
    if self.headers["Content-Range"].endswith("/*"):
      self._send(b"", 308, {"Range": f"bytes=0-{len(done) - 1}"})
      return
    self.server.objects[key] = bytes(self.server.parts.pop(key))
    self._send(json.dumps(self._about(key)).encode())

  def _log(self):
    self.server.requests.append((self.command, self.path))

  def _about(self, key):
    content = self.server.objects[key]
    digest = base64.b64encode(hashlib.md5(content).digest()).decode()
    return {
      "kind": "storage#object",
      "name": key,
      "bucket": "bucket",
      "size": str(len(content)),
      "md5Hash": digest,
      "generation": "1",
      "timeCreated": "2026-01-01T00:00:00Z",
      "updated": "2026-01-01T00:00:00Z",
    }

  def _list(self, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, folders = [], set()
    for key in sorted(self.server.objects):
      if key.startswith(prefix):
        rest = key[len(prefix) :]
        if delimiter and delimiter in rest:
          folders.add(prefix + rest.split(delimiter)[0] + delimiter)
        else:
          items.append(self._about(key))
    found = {"kind": "storage#objects", "items": items}
    self._send(json.dumps({**found, "prefixes": sorted(folders)}).encode())

  def _send_part(self, content):
    match = re.fullmatch(
      r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "bytes=0-"
    )
    if match[1]:
      start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
    else:
      start, stop = max(0, len(content) - int(match[2])), len(content)
    if start and start >= len(content):
      self._send(b"", 416)
      return
    stop = min(stop, len(content))
    whole = "Range" not in self.headers
    where = f"bytes {start}-{stop - 1}/{len(content)}"
    headers = {"x-goog-generation": "1"}
    if not whole:
      headers["Content-Range"] = where
    self._send(content[start:stop], 200 if whole else 206, headers)

  def _send(self, body, code=200, headers=()):
    self.send_response(code)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
  """Holds the objects, and what was asked for."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.objects, self.parts, self.requests = {}, {}, []
    self.url = f"http://127.0.0.1:{self.server_port}"

  def handle_error(self, request, client_address):
    # Clients hang up when they have what they want.
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


@contextlib.contextmanager
def serve():
  """Yields a server with `objects` (name -> bytes) and its `url`."""
  server = Server()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
