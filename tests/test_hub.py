"""The hub, as a small server of our own has it: what is fetched, what is pushed, what is said."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from torch import nn

import peftlite as pl
from peftlite import cli
from tests.zoo import seeded

# huggingface_hub 0.36 keeps sessions, and 1 a client, that know whether they are offline
RENEWED = getattr(_http, "close_session", None) or _http.reset_sessions


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Hub:
    """Repositories, each a list of commits, which hold files by their names."""

    def __init__(self) -> None:
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.asked: list[str] = []
        self.private: dict[str, bool] = {}

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.repos.setdefault(repo, [])
        sha = digest(f"{repo}{len(commits)}".encode())
        commits.append((sha, {**(commits[-1][1] if commits else {}), **files}))
        return sha

    def folder(self, repo: str, folder: Path, inside: str = "") -> str:
        return self.commit(repo, {inside + p.name: p.read_bytes() for p in folder.iterdir()})

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.repos[repo][-1]
        return next((c for c in self.repos[repo] if c[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self, body: Any, code: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/")
        self.hub.asked.append(path)
        if path.startswith("api/models/"):
            repo, tree, revision = path.removeprefix("api/models/").partition("/tree/")
            if not tree:
                repo, _, revision = repo.partition("/revision/")
            if repo not in self.hub.repos:
                return self.missing("RepoNotFound")
            if (found := self.hub.at(repo, revision or "main")) is None:
                return self.missing("RevisionNotFound")
            sha, files = found
            if tree:
                return self.answer(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                        for name, data in files.items()
                    ]
                )
            its = {"id": repo, "modelId": repo, "sha": sha, "private": False, "tags": []}
            return self.answer({**its, "siblings": [{"rfilename": name} for name in files]})
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        sha, files = self.hub.at(repo, revision) or ("", {})
        self.answer(files[name], X_Repo_Commit=sha, ETag=f'"{digest(files[name])}"')

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(self.path).strip("/")
        if path == "api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo.startswith("locked/"):
                return self.answer({"error": "you may not write here"}, 403)
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.private.setdefault(repo, private)
            self.hub.repos.setdefault(repo, [])
            return self.answer({"url": f"http://{self.headers['Host']}/{repo}"})
        repo = path.removeprefix("api/models/").rpartition("/")[0].rpartition("/")[0]
        if "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(data)["files"]]  # fmt: skip
            return self.answer({"files": files})
        lines = [json.loads(line) for line in data.splitlines()]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                 for line in lines if line["key"] == "file"}  # fmt: skip
        sha = self.hub.commit(repo, files)
        self.answer({"success": True, "commitUrl": f"{constants.ENDPOINT}/{repo}/commit/{sha}",
                     "commitOid": sha, "hookOutput": ""})  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    handler = type("Handler", (Handler,), {"hub": made})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    RENEWED()
    monkeypatch.chdir(tmp_path)
    yield made
    RENEWED()
    server.shutdown()
    server.server_close()


def base() -> nn.Module:
    with seeded():
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def delta(model: nn.Module, scale: float = 1.0) -> pl.Delta:
    made = pl.attach(model, pl.LoRA(rank=2), name="sql")
    with seeded(1):
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=scale)
    return made


def same(a: pl.Delta, b: pl.Delta) -> bool:
    mine, its = a.state_dict(), b.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


@pytest.mark.parametrize("format", ["peftlite", "peft"])
@pytest.mark.parametrize("path", ["", "/deep/er"])
def test_what_is_pushed_is_loaded(hub: Hub, format: Any, path: str) -> None:
    model, other = base(), base()
    first = delta(model)
    pinned = pl.push(first, f"me/sql{path}", format)
    assert hub.private == {"me/sql": True}
    (sha, _), *_ = hub.repos["me/sql"]
    assert pinned == f"me/sql{path}@{sha}"
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    pl.push("sql", f"me/sql{path}", format, model=model)  # pinned is what it was
    newest = pl.load(other, f"me/sql{path}", name="new")
    older = pl.load(other, pinned, name="old")
    assert same(newest, first) and not same(older, first)
    assert same(pl.load(other, f"me/sql{path}", name="again", revision=sha), older)
    info = pl.inspect(f"me/sql{path}", revision=sha)
    assert info.source == pinned and pinned in str(info)
    assert pl.inspect(f"me/sql{path}").source == f"me/sql{path}@{hub.repos['me/sql'][1][0]}"


def test_only_what_a_delta_is_of_is_fetched(hub: Hub, tmp_path: Path) -> None:
    pl.export(delta(base()), tmp_path / "peft", "peft")
    hub.folder("me/all", tmp_path / "peft")
    for name in ("model.safetensors", "adapter_model.bin", "x.py", "sub/adapter_config.json"):
        hub.commit("me/all", {name: b"not to be read"})
    loaded = pl.load(base(), "me/all")
    assert loaded.name == "all"
    files = {p.rpartition("/")[2] for p in hub.asked if "/resolve/" in p}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_bank_and_a_merge_take_its_names(hub: Hub, tmp_path: Path) -> None:
    model = base()
    pl.push(delta(model), "me/sql")
    pl.detach(model, "sql")
    safetensors.torch.save_file(model.state_dict(), "base.safetensors")
    pl.merge_files("base.safetensors", "me/sql", "out.safetensors")
    with pl.DeltaBank(model, slots=1, max_rank=2) as bank:
        bank.load("sql", "me/sql")
        y = torch.randn(2, 4)
        with bank.rows(["sql", "sql"]):
            found = model(y)
    merged = base()
    merged.load_state_dict(safetensors.torch.load_file("out.safetensors"))
    torch.testing.assert_close(found, merged(y))


def test_what_is_here_goes_first(hub: Hub, tmp_path: Path) -> None:
    model = base()
    pl.push(delta(model, 1.0), "me/sql")
    pl.detach(model, "sql")
    (tmp_path / "me").mkdir()
    here = delta(model, 2.0)
    pl.save(here, "me/sql")
    asked = len(hub.asked)
    assert same(pl.load(model, "me/sql", name="here"), here) and len(hub.asked) == asked


def test_without_a_connection_what_was_fetched_is_there(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("me/sql", {"training.py": b"is not fetched"})
    pinned = pl.push(delta(base()), "me/sql")
    first = pl.load(base(), "me/sql")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("me/sql", pinned):
        assert same(pl.load(base(), name), first)
    with pytest.raises(
        pl.FileError,
        match=r"there is no file 'me/other' here, and the hub can't be "
        r"asked for it .*: go on with a connection, or give the path of a copy",
    ):
        pl.load(base(), "me/other")
    with pytest.raises(pl.FileError, match=r"can't push to 'me/sql': .* hf auth login first"):
        pl.push(delta(base()), "me/sql")


def test_it_is_inspected_from_the_shell(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    pinned = pl.push(delta(base()), "me/sql")
    capsys.readouterr()
    assert cli.main(["inspect", pinned, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == pinned
    assert cli.main(["inspect", "me/lost"]) == 2
    error = capsys.readouterr().err
    assert "there is no file 'me/lost' here, and no repository 'me/lost' on the hub" in error


REFUSED = {
    "me/pickled": "is no delta by itself, having adapter_model.bin; adapter_config.json: "
    "pickles aren't fetched; type hf download me/pickled, then peftlite convert",
    "me/two": "having a.safetensors; b.safetensors: name one file, me/two/a.safetensors; "
    "me/two/b.safetensors",
    "me/two/c": "'me/two/c' on the hub is no delta by itself, having nothing: name one file",
    "me/two@v2": "'me/two' on the hub has no revision 'v2'",
    "locked/two": "no repository 'locked/two' on the hub",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_is_said(hub: Hub, name: str) -> None:
    hub.commit("me/pickled", {"adapter_model.bin": b"", "adapter_config.json": b"{}"})
    hub.commit("me/two", {"a.safetensors": b"", "b.safetensors": b""})
    with pytest.raises(pl.FileError) as error:
        pl.load(base(), name)
    assert REFUSED[name] in str(error.value)


def test_names_of_files_are_never_asked_for(hub: Hub) -> None:
    for path in ("runs/sql.safetensors", "runs/sql.pt", "./runs/sql", "/runs/sql", "sql"):
        with pytest.raises(pl.FileError, match="there is no file"):
            pl.load(base(), path)
    assert not hub.asked
