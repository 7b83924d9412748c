"""A Hub on the loopback interface: the part of its HTTP API that `huggingface_hub` uses for models, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# A token for each user; what else is sent as a token is no valid one.
TOKENS = {"hf_owner": "user", "hf_stranger": "stranger"}
LFS_SUFFIXES = (".safetensors", ".bin")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")


@dataclass
class Commit:
    oid: str
    parent: str | None
    summary: str
    # Content by path; large files are known by the SHA-256 of theirs.
    files: dict[str, bytes] = field(repr=False)
    large: frozenset[str] = frozenset()


@dataclass
class Repository:
    owner: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a commit hash names."""
        return self.commits.get(self.refs.get(revision, revision))

    def commit(
        self, branch: str, summary: str, files: dict[str, bytes], large: frozenset[str] = frozenset()
    ) -> Commit:
        parent = self.refs.get(branch)
        oid = hashlib.sha1(repr((parent, summary, sorted(files), len(self.commits))).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, summary, files, large)
        self.refs[branch] = oid
        return self.commits[oid]


class Refusal(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message}
        if code is not None:
            self.headers["X-Error-Code"] = code
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit


class LoopbackHub:
    """
    The server; a context manager that runs it in a thread. Large files are redirected to another origin, as the Hub
    does, which tells their size, and to which a client must not send its token.

    Attributes:
        endpoint: What `HF_ENDPOINT` must be before `huggingface_hub` is imported.
        storage: Where large files are.
        repositories: By their id.
        large_files: Content by its SHA-256, uploaded but not necessarily committed.
        requests: (method, path, `Range` header) of each, in their order.
        unknown: The requests that no route answers.
        faults: What goes wrong: "upload" (a large file), "commit" (its body) and "download" (a large file) cut the
            connection in the middle; each holds how often. After a cut, where `down_after_a_cut`, requests for large
            files are refused until `recover` is called.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.unknown: list[str] = []
        self.faults = {"upload": 0, "commit": 0, "download": 0}
        self.down_after_a_cut = False
        self.is_down = False
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        endpoint_port, storage_port = (server.server_address[1] for server in self._servers)
        # huggingface_hub 1 tells origins apart by their hosts alone.
        self.endpoint, self.storage = f"http://127.0.0.1:{endpoint_port}", f"http://localhost:{storage_port}"

    def __enter__(self) -> "LoopbackHub":
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].resolve(revision).files

    def add_large_file(self, repo_id: str, name: str, content: bytes) -> None:
        """A public repository that holds one large file."""
        repository = self.repositories[repo_id] = Repository(repo_id.split("/")[0], private=False)
        repository.commit("main", "large", {name: content}, frozenset({name}))
        self.large_files[hashlib.sha256(content).hexdigest()] = content

    def cut(self, what: str, times: int = 1, down_after: bool = False) -> None:
        self.faults[what] = times
        self.down_after_a_cut = down_after

    def recover(self) -> None:
        self.faults = dict.fromkeys(self.faults, 0)
        self.is_down = False

    def is_cut(self, what: str) -> bool:
        with self.lock:
            if not self.faults[what]:
                return False
            self.faults[what] -= 1
            self.is_down = self.down_after_a_cut
            return True


def card_errors(content: str) -> list[str]:
    """What is wrong with the metadata of a model card, by the rules of the Hub's model card specification."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return ["there is no metadata"]
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    errors = []

    def require(holds: bool, message: str) -> None:
        if not holds:
            errors.append(message)

    def strings(value) -> list:
        return value if isinstance(value, list) else [value]

    for name in ("tags", "datasets", "base_model", "language", "license", "library_name", "pipeline_tag"):
        if name in data:
            require(all(isinstance(item, str) and item for item in strings(data[name])), f"{name} must hold strings")
    for name in ("datasets", "base_model"):
        for item in strings(data.get(name, [])):
            require(
                re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(item)) is not None, f"{name}: {item!r} is no repository id"
            )
    for item in strings(data.get("language", [])):
        require(item in ("code", "multilingual") or re.fullmatch(r"[a-z]{2,3}", str(item)) is not None, "language")
    for item in data.get("widget", []):
        require(isinstance(item, dict) and isinstance(item.get("text"), str), "widget must hold mappings with a text")
    for model in data.get("model-index", []):
        require(isinstance(model.get("name"), str), "model-index: name is required")
        require(isinstance(model.get("results"), list), "model-index: results are required")
        for result in model.get("results") or []:
            require(isinstance(result.get("task", {}).get("type"), str), "model-index: task.type is required")
            for key in ("type", "name"):
                require(isinstance(result.get("dataset", {}).get(key), str), f"model-index: dataset.{key} is required")
            require(bool(result.get("metrics")), "model-index: metrics are required")
            for metric in result.get("metrics", []):
                require(isinstance(metric.get("type"), str), "model-index: metrics.type is required")
                value = metric.get("value")
                require(isinstance(value, (int, float, str)) and value == value, "model-index: metrics.value")
    return errors


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path, errors="strict"), parse_qs(parts.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self._unread = int(self.headers.get("Content-Length") or 0)
        try:
            for methods, pattern, name in ROUTES:
                # A branch's name may hold a quoted slash, which must not be taken for one of the path.
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in methods:
                    return getattr(self, name)(*map(unquote, match.groups(default="")))
            self.hub.unknown.append(f"{self.command} {self.path}")
            raise Refusal(404, "no such route")
        except Refusal as refusal:
            self._body()
            self._send(refusal.status, {"error": refusal.message}, refusal.headers)
        except ConnectionError:
            self.close_connection = True

    # What a request carries, and what it is answered with.

    def _body(self) -> bytes:
        length, self._unread = self._unread, 0
        return self.rfile.read(length)

    def _cut_the_connection(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    def _send(self, status: int, content, headers: dict[str, str] | None = None, size: int | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        """The repository, unless it is not there or not for this user: the Hub does not tell which."""
        user, repository = self._user(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repository.owner):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user != repository.owner:
            raise Refusal(403, "Forbidden: you don't have the rights to write to this repository")
        return repository

    def _commit(self, repo_id: str, revision: str) -> Commit:
        commit = self._repository(repo_id).resolve(revision or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # The routes.

    def control(self) -> None:
        """Not of the Hub: by this a client says what goes wrong next."""
        request = json.loads(self._body())
        if "cut" in request:
            self.hub.cut(request["cut"], request.get("times", 1), request.get("down_after", False))
        else:
            self.hub.recover()
        self._send(200, {})

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"role": "write", "displayName": "test"}
        self._send(200, {"type": "user", "name": user, "auth": {"accessToken": token}, "orgs": []})

    def harnesses(self) -> None:
        """A registry by which the client says what runs it; an empty one."""
        self._send(200, {"standardEnvVars": [], "harnesses": {}})

    def create(self) -> None:
        user, request = self._user(), json.loads(self._body())
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = request.get("organization") or user
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{request['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return self._send(409, {**answer, "error": "You already created this model repo"})
        repository = Repository(owner, request.get("visibility") == "private")
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[repo_id] = repository
        self._send(200, answer)

    def validate_yaml(self) -> None:
        errors = card_errors(json.loads(self._body())["content"])
        messages = [{"message": message} for message in errors]
        self._send(400 if errors else 200, {"errors": messages, "warnings": []})

    def branch(self, repo_id: str, branch: str) -> None:
        repository = self._repository(repo_id, write=True)
        request = json.loads(self._body() or b"{}")
        if branch in repository.refs:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.refs[branch] = repository.resolve(request.get("startingPoint") or "main").oid
        self._send(200, {})

    def info(self, repo_id: str, revision: str) -> None:
        repository, commit = self._repository(repo_id), self._commit(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        answer = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit.oid, "siblings": siblings}
        self._send(200, {**answer, "private": repository.private, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str, folder: str) -> None:
        commit = self._commit(repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive") == ["True"] or self.query.get("recursive") == ["true"]
        entries, folders = [], set()
        for path in sorted(commit.files):
            if not path.startswith(prefix):
                continue
            if "/" in path[len(prefix) :] and not recursive:
                folders.add(prefix + path[len(prefix) :].split("/")[0])
            else:
                entries.append({"type": "file", "path": path, **self._file(commit, path)})
        if folder and not entries and not folders:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound", commit.oid)
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
        self._send(200, entries)

    def _file(self, commit: Commit, path: str) -> dict:
        content = commit.files[path]
        answer = {"oid": _git_hash(content), "size": len(content)}
        if path in commit.large:
            answer["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return answer

    def preupload(self, repo_id: str, revision: str) -> None:
        self._repository(repo_id, write=True)
        commit, answers = self._commit(repo_id, revision), []
        for file in json.loads(self._body())["files"]:
            answer = {"path": file["path"], "shouldIgnore": False}
            large = file["path"].endswith(LFS_SUFFIXES)
            answer["uploadMode"] = "lfs" if large else "regular"
            if file["path"] in commit.files:
                held = self._file(commit, file["path"])
                answer["oid"] = held.get("lfs", held)["oid"]
            answers.append(answer)
        self._send(200, {"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self._repository(repo_id, write=True)
        answers = []
        for item in json.loads(self._body())["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large_files:
                url = f"{self.hub.storage}/large/{item['oid']}"
                answer["actions"] = {
                    "upload": {"href": url},
                    "verify": {"href": f"{self.hub.endpoint}/large/{item['oid']}/verify"},
                }
            answers.append(answer)
        self._send(200, {"transfer": "basic", "objects": answers})

    def _check_no_token(self) -> None:
        if self.headers.get("Authorization"):
            raise Refusal(400, "a token was sent to the storage")

    def put_large(self, oid: str) -> None:
        self._check_no_token()
        if self.hub.is_down:
            raise Refusal(403, "Request has expired")
        if self.hub.is_cut("upload"):
            self.rfile.read(self._unread // 2)
            return self._cut_the_connection()
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content is not what was announced")
        self.hub.large_files[oid] = content
        self._send(200, b"")

    def verify_large(self, oid: str) -> None:
        held, asked = self.hub.large_files.get(oid), json.loads(self._body())
        if held is None or len(held) != asked["size"]:
            raise Refusal(404, "the object was not uploaded")
        self._send(200, {})

    def commit(self, repo_id: str, branch: str) -> None:
        repository = self._repository(repo_id, write=True)
        if self.hub.is_cut("commit"):
            self.rfile.read(self._unread // 2)
            return self._cut_the_connection()
        lines = [json.loads(line) for line in self._body().splitlines()]
        if branch not in repository.refs:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent, summary = repository.resolve(branch), ""
        files, large = dict(parent.files), set(parent.large)
        # Everything is read before anything is changed.
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                large.discard(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise Refusal(400, f"the large file {value['path']} was not uploaded")
                files[value["path"]] = self.hub.large_files[value["oid"]]
                large.add(value["path"])
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                large.discard(value["path"])
            else:
                raise Refusal(400, f"unknown operation {line['key']}")
        for path in ["README.md"] if "README.md" in files else []:
            errors = card_errors(files[path].decode())
            if errors:
                raise Refusal(400, f"invalid card: {errors}")
        commit = repository.commit(branch, summary, files, frozenset(large))
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}"
        self._send(200, {"success": True, "commitOid": commit.oid, "commitUrl": url})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit(repo_id, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.oid)
        content = commit.files[path]
        if path not in commit.large:
            headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{_git_hash(content)}"'}
            return self._send_range(content, headers)
        oid = hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": commit.oid,
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.storage}/large/{oid}",
        }
        self._send(302, b"", headers)

    def get_large(self, oid: str) -> None:
        self._check_no_token()
        if self.hub.is_down:
            raise Refusal(503, "Service unavailable")
        content = self.hub.large_files[oid]
        if self.command == "GET" and self.hub.is_cut("download"):
            self._send(200, content[: len(content) // 2], size=len(content))
            return self._cut_the_connection()
        self._send_range(content, {"ETag": f'"{oid}"'})

    def _send_range(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {"Accept-Ranges": "bytes", **headers}
        if wanted is None:
            return self._send(200, content, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        if first >= len(content):
            raise Refusal(416, "Requested range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"([^/]+/[^/]+)"
_READ, _POST = ("GET", "HEAD"), ("POST",)
ROUTES = [
    (_POST, r"/control", "control"),
    (_READ, r"/api/whoami-v2", "whoami"),
    (_READ, r"/api/agent-harnesses", "harnesses"),
    (_POST, r"/api/repos/create", "create"),
    (_POST, r"/api/validate-yaml", "validate_yaml"),
    (_POST, rf"/api/models/{_REPO}/branch/([^/]+)", "branch"),
    (_POST, rf"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    (_POST, rf"/api/models/{_REPO}/commit/([^/]+)", "commit"),
    (_READ, rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.*))?", "tree"),
    (_READ, rf"/api/models/{_REPO}(?:/revision/([^/]+))?", "info"),
    (_POST, rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), r"/large/([0-9a-f]{64})", "put_large"),
    (_POST, r"/large/([0-9a-f]{64})/verify", "verify_large"),
    (_READ, r"/large/([0-9a-f]{64})", "get_large"),
    (_READ, rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
]
