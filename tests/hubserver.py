"""A Hugging Face Hub on this machine, for tests: what huggingface_hub 2.x asks of one to make, fill, list and read a repository.

    with Hub(tmp_path, {"hf_secret": "me"}) as hub:
        HfApi(endpoint=hub.address, token="hf_secret").create_repo("me/model")

`HF_ENDPOINT` points the unmodified client at it in another process; with `HF_HUB_DISABLE_XET=1` large files go by LFS, basic or,
from `multipart` bytes on, in parts. Tokens, private repositories, unchanged files, range requests and checksums are as on the
Hub; a commit that names a large file which never came whole is refused. `faults` are played back on matching requests:

    hub.faults.append(Fault("PUT /lfs/", status=500, times=2))

Source of the routes and their fields: huggingface_hub 2.4.0's own requests (hf_api.py, _commit_api.py, lfs.py, file_download.py),
and Git LFS's batch API. What it leaves out: Xet, branches, pull requests, writing to data sets.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

LARGE = 1 << 20  # bytes from which a file goes to LFS; the Hub also takes what is not text


@dataclass
class Fault:
    """What happens to requests whose "METHOD /path" begins with `match`.

    `status` is answered with `headers` and `body`, the connection is `cut` in the middle, the answer comes `wait` seconds late or
    is `lost` after all was done, or what was sent is damaged (`corrupt`). `skip` requests pass first; then it happens
    `times` times.
    """

    match: str
    status: int = 0
    headers: dict = field(default_factory=dict)
    body: bytes = b"{}"
    cut: bool = False
    lost: bool = False
    wait: float = 0.0
    corrupt: bool = False
    times: int = 1
    skip: int = 0


@dataclass
class Repository:
    private: bool
    files: dict[str, str] = field(default_factory=dict)  # path → sha256 of its content
    commits: list[str] = field(default_factory=list)  # messages

    @property
    def head(self) -> str:
        return hashlib.sha1(json.dumps([self.commits, sorted(self.files.items())]).encode()).hexdigest()


class Hub:
    """The server; `repositories` by id, `seen` as (method, path, user), `sent` bytes of LFS content that came."""

    def __init__(self, folder: Path, users: dict[str, str], *, multipart: int = 8 << 20):
        self.blobs, self.users, self.multipart = Path(folder) / "blobs", users, multipart
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Repository] = {}
        self.gated: set[str] = set()  # whose licence nobody here has accepted
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str, str | None]] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        self.sent, self.lock = 0, threading.Lock()

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(Request):
            def setup(self):
                self.hub = hub
                super().setup()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def content(self, repository: str, path: str) -> bytes:
        return (self.blobs / self.repositories[repository].files[path]).read_bytes()

    def fill(self, repository: str, content: dict[str, bytes]) -> None:
        """Make a public repository (`datasets/OWNER/NAME` for data) as if it had been there before."""
        self.repositories[repository] = Repository(False, {path: self.keep(data) for path, data in content.items()})

    def keep(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        (self.blobs / name).write_bytes(data)
        return name

    def git_oid(self, name: str) -> str:
        data = (self.blobs / name).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if line.startswith(fault.match) and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str = "", code: str = "", **extra):
        super().__init__(message)
        self.status, self.code, self.extra = status, code, extra


ROUTES = []


def route(method: str, pattern: str):
    def keep(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return keep


class Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def user(self) -> str | None:
        return self.hub.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def handle_one(self) -> None:
        path, line = self.path.partition("?")[0], f"{self.command} {self.path}"
        self.hub.seen.append((self.command, path, self.user))
        fault = self.hub.fault(line)
        if fault and fault.wait:
            time.sleep(fault.wait)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.cut:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return None
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault and fault.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1]) if body else b"?"
        self.silent = bool(fault and fault.lost)
        if fault and fault.status:
            return self.reply(fault.status, fault.body, fault.headers)
        if (self.headers.get("Authorization") or "") and self.user is None:
            return self.refuse(Refused(401, "Invalid credentials in Authorization header"))
        for method, pattern, function in ROUTES:
            if method == ("GET" if self.command == "HEAD" else self.command) and (found := pattern.fullmatch(path)):
                try:
                    return function(self, body, **found.groupdict())
                except Refused as why:
                    return self.refuse(why)
        return self.refuse(Refused(404, "no such route"))

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def refuse(self, why: Refused) -> None:
        headers = {"X-Error-Code": why.code} if why.code else {}
        headers["X-Error-Message"] = str(why)
        self.reply(why.status, json.dumps({"error": str(why), **why.extra}).encode(), headers)

    def json(self, value) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        if self.silent:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repository(self, name: str, write: bool = False) -> Repository:
        """The repository, if this user may see it, or write it."""
        found, own = self.hub.repositories.get(name), name.partition("/")[0] == self.user
        if name in self.hub.gated:
            raise Refused(403, f"Access to model {name} is restricted", "GatedRepo")
        if found is None or (found.private and not own):  # a private one is not there for others
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not own:
            raise Refused(403, f"You don't have the rights to write to {name}")
        return found


NAME = r"(?P<name>(?:datasets/)?[\w.-]+/[\w.-]+)"
API = rf"/api/(?:models/)?{NAME}"  # data sets: /api/datasets/OWNER/NAME


@route("GET", "/api/whoami-v2")
def whoami(request, _):
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    request.json({"type": "user", "name": request.user, "orgs": [], "auth": {"type": "access_token"}})


@route("POST", "/api/repos/create")
def create(request, body):
    asked = json.loads(body)
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    owner = asked.get("organization") or request.user
    name = f"{owner}/{asked['name']}"
    if owner != request.user:
        raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    with request.hub.lock:
        if name in request.hub.repositories:
            raise Refused(409, "You already created this model repo", url=f"{request.hub.address}/{name}")
        request.hub.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
    request.json({"url": f"{request.hub.address}/{name}", "name": name, "id": name})


@route("POST", "/api/validate-yaml")
def validate(request, body):
    if errors := card_errors(json.loads(body)["content"]):
        raise Refused(400, "Invalid metadata", errors=[{"message": each} for each in errors], warnings=[])
    request.json({"errors": [], "warnings": []})


@route("POST", rf"{API}/preupload/main")
def preupload(request, body, name):
    repository, answers = request.repository(name, write=True), []
    for file in json.loads(body)["files"]:
        sample = base64.b64decode(file["sample"])
        large = file["size"] >= LARGE or b"\0" in sample
        held = repository.files.get(file["path"])
        oid = None
        if held:
            oid = held if large else request.hub.git_oid(held)
        mode = "lfs" if large else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    request.json({"files": answers})


@route("POST", rf"/{NAME}\.git/info/lfs/objects/batch")
def batch(request, body, name):
    request.repository(name, write=True)
    objects = []
    for wanted in json.loads(body)["objects"]:
        oid, size, address = wanted["oid"], wanted["size"], request.hub.address
        actions = {"verify": {"href": f"{address}/lfs/verify/{name}"}}
        if size >= request.hub.multipart:
            count = -(-size // request.hub.multipart)
            parts = {f"{n:05}": f"{address}/lfs/part/{oid}/{n}" for n in range(1, count + 1)}
            header = {"chunk_size": str(request.hub.multipart), **parts}
            actions["upload"] = {"href": f"{address}/lfs/complete/{oid}", "header": header}
        else:
            actions["upload"] = {"href": f"{address}/lfs/object/{oid}"}
        there = (request.hub.blobs / oid).is_file()
        objects.append({"oid": oid, "size": size} | ({} if there else {"actions": actions}))
    request.json({"transfer": "basic", "objects": objects})


def _store(request, oid: str, data: bytes) -> None:
    request.hub.sent += len(data)
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refused(400, "the content does not have the checksum that was announced")
    request.hub.keep(data)


@route("PUT", r"/lfs/object/(?P<oid>\w+)")
def upload(request, body, oid):
    _store(request, oid, body)
    request.reply(200)


@route("PUT", r"/lfs/part/(?P<oid>\w+)/(?P<number>\d+)")
def upload_part(request, body, oid, number):
    request.hub.parts[oid, int(number)] = body
    request.reply(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})


@route("POST", r"/lfs/complete/(?P<oid>\w+)")
def complete(request, body, oid):
    numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
    if missing := [n for n in numbers if (oid, n) not in request.hub.parts]:
        raise Refused(400, f"part {missing[0]} never came")
    _store(request, oid, b"".join(request.hub.parts.pop((oid, n)) for n in numbers))
    request.json({})


@route("POST", rf"/lfs/verify/{NAME}")
def verify(request, body, name):
    wanted = json.loads(body)
    blob = request.hub.blobs / wanted["oid"]
    if not blob.is_file() or blob.stat().st_size != wanted["size"]:
        raise Refused(404, "the object is not there")
    request.json({})


@route("POST", rf"{API}/commit/main")
def commit(request, body, name):
    repository, lines = request.repository(name, write=True), [json.loads(line) for line in body.splitlines()]
    header, changes = lines[0]["value"], lines[1:]
    files = dict(repository.files)
    for change in changes:
        kind, value = change["key"], change["value"]
        if kind == "file":
            data = base64.b64decode(value["content"])
            if value["path"] == "README.md" and (errors := card_errors(data.decode())):
                raise Refused(400, f"Invalid metadata: {errors[0]}")
            files[value["path"]] = request.hub.keep(data)
        elif kind == "lfsFile":
            if not (request.hub.blobs / value["oid"]).is_file():
                raise Refused(400, f"{value['path']} points to content that never came")
            files[value["path"]] = value["oid"]
        elif kind == "deletedFile":
            files.pop(value["path"], None)
        else:
            raise Refused(400, f"unknown change {kind}")
    with request.hub.lock:
        if header.get("parentCommit") not in (None, repository.head):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        repository.files = files
        repository.commits.append(header["summary"])
    address = f"{request.hub.address}/{name}/commit/{repository.head}"
    request.json({"success": True, "commitOid": repository.head, "commitUrl": address, "hookOutput": ""})


@route("GET", rf"{API}(/revision/[\w.-]+)?")
def info(request, _, name):
    repository = request.repository(name)
    siblings = [{"rfilename": path} for path in sorted(repository.files)]
    request.json(
        {"id": name, "modelId": name, "sha": repository.head, "private": repository.private, "siblings": siblings}
    )


def _entry(request, path: str, oid: str) -> dict:
    size = (request.hub.blobs / oid).stat().st_size
    entry = {"type": "file", "path": path, "size": size, "oid": request.hub.git_oid(oid)}
    return entry | ({"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if size >= LARGE else {})


@route("GET", rf"{API}/tree/[\w.-]+")
def tree(request, _, name):
    files = request.repository(name).files
    request.json([_entry(request, path, oid) for path, oid in sorted(files.items())])


@route("POST", rf"{API}/paths-info/[\w.-]+")
def paths_info(request, body, name):
    files = request.repository(name).files
    request.json([_entry(request, path, files[path]) for path in json.loads(body)["paths"] if path in files])


@route("GET", rf"/{NAME}/resolve/[\w.-]+/(?P<path>.+)")
def resolve(request, _, name, path):
    repository = request.repository(name)
    head = {"X-Repo-Commit": repository.head, "Accept-Ranges": "bytes"}
    if path not in repository.files:
        return request.reply(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", **head})
    oid = repository.files[path]
    data = (request.hub.blobs / oid).read_bytes()
    head |= {"ETag": f'"{oid}"'}
    if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if first > last:
            return request.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        head["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return request.reply(206, data[first : last + 1], head)
    return request.reply(200, data, head)


RELATIONS = ("adapter", "merge", "quantized", "finetune")  # source: the Hub's documentation of model cards


def card_errors(text: str) -> list[str]:
    """What the Hub says is wrong with a card's metadata; source of the rules: its documentation of model cards."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, flags=re.DOTALL)
    if not found:
        return []  # a warning on the Hub: no metadata
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML: {str(error).splitlines()[0]}"]
    if not isinstance(data, dict):
        return ["metadata is no mapping"]
    errors, texts = [], ("license", "license_name", "license_link", "library_name", "pipeline_tag")
    errors += [f"{key} must be a string" for key in texts if key in data and not isinstance(data[key], str)]
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append("license_name is needed where the license is other")
    for key in ("tags", "language", "datasets"):
        value = data.get(key, [])
        listed = value if isinstance(value, list) else [value] if key == "language" else [None]
        errors += [f"{key} must be a list of strings"] if not all(isinstance(each, str) for each in listed) else []
    bases = data.get("base_model", [])
    bases = bases if isinstance(bases, list) else [bases]
    errors += [f"base_model {b!r} is no model id" for b in bases if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(b))]
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        errors.append(f"base_model_relation must be one of {', '.join(RELATIONS)}")
    for entry in data.get("model-index", []):
        errors += _index_errors(entry)
    return errors


def _index_errors(entry) -> list[str]:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("name"), str)
        or not isinstance(entry.get("results"), list)
    ):
        return ["model-index needs a name and results"]
    errors = []
    for result in entry["results"]:
        task, dataset = result.get("task") or {}, result.get("dataset") or {}
        errors += [] if isinstance(task.get("type"), str) else ["model-index: a result needs task.type"]
        named = isinstance(dataset.get("type"), str) and isinstance(dataset.get("name"), str)
        errors += [] if named else ["model-index: a result needs dataset.type and dataset.name"]
        metrics = result.get("metrics")
        if not isinstance(metrics, list) or not metrics:
            errors.append("model-index: a result needs metrics")
            continue
        for metric in metrics:
            if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float | str):
                errors.append("model-index: a metric needs type and value")
    return errors
