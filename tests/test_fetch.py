"""paper/fetch.py against a server on loopback: what comes whole and as what it should be, and what must not: two at
once, two versions joined, a page of HTML for a file, a zip bomb, a broken archive half unpacked, what a kill leaves."""

import errno
import gzip
import http.server
import io
import os
import random
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_squad, write_wikiann, write_xnli

import data
from data import InputError
from model import load
from paper import fetch

pooch = pytest.importorskip("pooch")
hub = pytest.importorskip("huggingface_hub")

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
BASE, COMMIT = "xlm-roberta-base", "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files, {path: bytes}, as the Hub does; server.answers, {path: what is done to a Handler}, first."""

    def do_HEAD(self):
        self.start(self.server.files.get(self.path))

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if self.path in self.server.answers:
            self.server.answers[self.path](self)
        elif self.start(content):
            self.wfile.write(content)

    def start(self, content):
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        headers = {"Content-Length": len(content), "ETag": f'"{Path(self.path).name}"', "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        return True

    def log_message(self, *arguments):
        pass


def half(handler, then=lambda: None):
    """An answer that is cut after half of the content, once `then` has returned."""
    content = handler.server.files[handler.path]
    handler.start(content)
    handler.wfile.write(content[: len(content) // 2])
    then()
    handler.close_connection = True


@pytest.fixture
def server(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the libraries' attempts
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.answers, server.asked = {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def tarred(files):
    """Not compressed: damage of a text is then told by the check sum at the end of gzip alone."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=0) as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return content.getvalue()


def packed(task, files):
    """Their archive as it is: with the files in a folder of its own, and with others."""
    around = {"ner": "", "qam": "xglue_full_dataset/QAM/"}.get(task)
    inside = {name if around is None else around + Path(name).name: text for name, text in files.items()}
    junk = {f"__MACOSX/{Path(name).parent}/._{Path(name).name}": b"macOS" for name in files}
    return (tarred if task == "qam" else zipped)({**inside, **junk, "README.md": b"x", "../x": b"x"})


def below(folder):
    """{name: content} of the files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """{task: {file: content}}: everything that is to come, in the official formats."""
    folder = tmp_path_factory.mktemp("official")
    for source in fetch.SOURCES["mlqa"]:
        for n, file in enumerate(source.files):
            write_squad(folder / "mlqa" / file, "en", "en", 2, n)
    for language in data.NER_LANGUAGES:
        file = folder / "ner" / "panx_dataset" / f"{language}.tar.gz"
        write_wikiann(file, "en", {"train": 3, "dev": 2, "test": 2})
        content = gzip.decompress(file.read_bytes()).replace(b"en:", f"{language}:".encode())
        file.write_bytes(gzip.compress(content))
    (folder / "xnli").mkdir()
    write_xnli(folder / "xnli", dev=4, test=4)
    (folder / "qam" / "xglue" / "QAM").mkdir(parents=True)
    for file in fetch.SOURCES["qam"][0].files:
        (folder / "qam" / file).write_text("who?\tthe river\t0\nwhat?\ta mill\t1\n" * 20)
    return {task: below(folder / task) for task in fetch.SOURCES}


@pytest.fixture
def official(server, contents, monkeypatch):
    """The server with the archives and files of all tasks, which the addresses lead to, and no hash known."""
    sources = {}
    for task, group in fetch.SOURCES.items():
        sources[task] = tuple(replace(s, url=s.name if task == "qam" else f"{server.url}/{s.name}") for s in group)
        for source in group:
            files = {name: contents[task][name] for name in source.files}
            server.files[f"/{source.name}"] = packed(task, files) if source.is_archive else files[source.files[0]]
    monkeypatch.setattr(fetch, "SOURCES", sources)
    monkeypatch.setattr(fetch, "SHA256", {})
    monkeypatch.setattr(fetch, "RETRIES", 1)
    return server


def fails(what, *says, data="data", out=None):
    """Fetching raises InputError, one line that holds these texts."""
    with pytest.raises(InputError) as error:
        fetch.fetch(what, data, out)
    assert "\n" not in str(error.value) and all(text in str(error.value) for text in says), error.value
    return str(error.value)


# --- data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["xnli", "mlqa", "ner"])
def test_what_is_fetched_is_what_is_loaded_and_nothing_is_fetched_twice(
    official, contents, tiny_tokenizer, tmp_path, task
):
    folder, names = tmp_path / "data", [f"/{source.name}" for source in fetch.SOURCES[task]]
    for _ in range(2):
        fetch.fetch(task, folder)
        assert below(folder) == contents[task] and official.asked == names  # of an archive those that are used alone
    loaded = data.load(task, folder, data.Tokenizer(tiny_tokenizer), cache=tmp_path / "cache")
    assert len(loaded.dev) == {"xnli": 3, "mlqa": 7, "ner": 40}[task]
    for source in fetch.SOURCES[task]:  # a missing file is fetched again, and nothing else is touched
        *others, gone = source.files
        (folder / gone).unlink()
        for other in others:
            (folder / other).write_text("mine")
        fetch.fetch(task, folder)
        assert official.asked.pop() == f"/{source.name}" and official.asked == names
        assert (folder / gone).read_bytes() == contents[task][gone]
        assert all((folder / other).read_text() == "mine" for other in others)


def test_qam_is_no_longer_to_be_had(official, tiny_tasks, tmp_path):
    message = fails("qam", "xglue/QAM/xglue.qam.en.train is not there", "no longer on its server", data=tmp_path)
    assert message.endswith(f"or put the archive at {tmp_path / 'xglue_full_dataset.tar.gz'}")
    fetch.fetch("qam", tiny_tasks)  # under the other names, en.train.tsv
    assert not official.asked


def spoilt(how, files):
    """An archive of files that is spoilt, and what is said of it."""
    last = [*files][-1]
    bomb, sizes = zipped({**files, last: bytes(3_000_000)}), [n.to_bytes(4, "little") for n in (3_000_000, 10)]
    broken = "is not a whole zip archive"
    return {
        "page of HTML": (PAGE, broken),
        "lacking": (zipped(dict([*files.items()][:-1])), f"lacks {last}"),
        "bomb": (bomb, "would unpack to more than 2 MB"),
        "bomb that names a small size": (bomb.replace(*sizes), broken),
    }[how]


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("how", ["page of HTML", "lacking", "bomb", "bomb that names a small size"])
def test_a_spoilt_archive_leaves_nothing_behind(official, contents, tmp_path, monkeypatch, how, by_hand):
    sources = tuple(replace(source, limit=2) for source in fetch.SOURCES["xnli"])
    monkeypatch.setitem(fetch.SOURCES, "xnli", sources)
    place, good = tmp_path / "XNLI-1.0.zip", official.files["/XNLI-1.0.zip"]
    content, says = spoilt(how, {name: contents["xnli"][name] for name in sources[0].files})
    if by_hand:
        place.write_bytes(content)
        begin, end = f"{place} ", "remove it and fetch it again"
    else:
        official.files["/XNLI-1.0.zip"] = content
        begin, end = f"XNLI-1.0.zip, from {official.url}/XNLI-1.0.zip, ", f"or fetch it by hand and put it at {place}"
    assert fails("xnli", begin + says, data=tmp_path).endswith(end)
    assert below(tmp_path) == ({place.name: content} if by_hand else {})
    place.unlink(missing_ok=True)
    official.files["/XNLI-1.0.zip"] = good
    fetch.fetch("xnli", tmp_path)  # what was spoilt does not stand in the way
    assert below(tmp_path) == contents["xnli"]


@pytest.mark.parametrize("task", ["xnli", "qam"])
def test_of_a_damaged_archive_comes_what_was_in_it_or_nothing(official, contents, tmp_path, monkeypatch, task):
    """Every third is cut; of the others a bit is another."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setitem(fetch.SOURCES, task, fetch.SOURCES[task][:1])
    files = {name: contents[task][name] for name in fetch.SOURCES[task][0].files}
    whole, archive, draw, refused = packed(task, files), tmp_path / fetch.SOURCES[task][0].name, random.Random(0), 0
    for i in range(200):
        content = bytearray(whole[: draw.randrange(len(whole))] if i % 3 == 0 else whole)
        if i % 3:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        archive.write_bytes(content)
        try:
            fetch.fetch(task, tmp_path)
        except InputError as error:
            refused += "\n" not in str(error)
            assert [*below(tmp_path)] == [archive.name]
        else:
            assert below(tmp_path) == {**files, archive.name: bytes(content)}
            for file in files:
                (tmp_path / file).unlink()
    assert refused >= 67  # all that were cut


@pytest.mark.parametrize("content", [PAGE, b"[]", b'{"data": []}', b'{"data": [{"paragraphs": [{"qas": [{}]}]}]}'])
def test_a_single_file_that_is_not_what_it_should_be_gets_no_name(official, contents, tmp_path, content):
    place, good = tmp_path / "xquad" / "xquad.es.json", official.files["/xquad.es.json"]
    official.files["/xquad.es.json"] = content
    begin = f"xquad.es.json, from {official.url}/xquad.es.json, is not in SQuAD's format"
    assert fails("mlqa", begin, data=tmp_path).endswith(f"put it at {place}") and not place.exists()
    official.files["/xquad.es.json"] = good
    official.asked.clear()
    fetch.fetch("mlqa", tmp_path)  # the rest; what was fetched before stays
    names = "xquad.es xquad.hi xquad.vi xquad.zh dev-v1.1 train-v1.1".split()
    assert official.asked == [f"/{name}.json" for name in names] and below(tmp_path) == contents["mlqa"]


def test_a_known_hash_is_checked(official, contents, tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.SHA256, "XNLI-1.0.zip", "0" * 64)
    fails("xnli", "does not match the known hash", "put it at", data=tmp_path)
    assert not below(tmp_path) and official.asked == ["/XNLI-1.0.zip"] * 2  # and once more, as it may have been damaged
    (tmp_path / "archive").write_bytes(official.files["/XNLI-1.0.zip"])
    monkeypatch.setitem(fetch.SHA256, "XNLI-1.0.zip", data.file_sha256(tmp_path / "archive"))
    fetch.fetch("xnli", tmp_path)
    assert below(tmp_path).keys() == {*contents["xnli"], "archive"}


def test_the_known_hashes_are_of_files_that_are_fetched():
    names = {source.name for group in fetch.SOURCES.values() for source in group}
    assert names >= {*fetch.SHA256} >= {name for name in names if name.endswith(".zip")}
    assert all(len(bytes.fromhex(known)) == 32 for known in fetch.SHA256.values())


def test_a_full_disk_is_not_the_networks_fault(official, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    with pytest.raises(OSError, match="No space left"):
        fetch.fetch("xnli", tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_broken_download_begins_anew_and_does_not_join_two_versions(official, contents, tmp_path):
    path = "/XNLI-1.0.zip"
    new = official.files[path]

    def answer(handler):
        half(handler, then=official.answers.clear)
        official.files[path] = new

    official.files[path] = zipped(dict.fromkeys(fetch.SOURCES["xnli"][0].files, b"of another version " * 100))
    official.answers[path] = answer
    fetch.fetch("xnli", tmp_path)
    assert official.asked[:2] == ["/XNLI-1.0.zip"] * 2 and below(tmp_path) == contents["xnli"]


@pytest.mark.skipif(fetch.fcntl is None, reason="no locks of folders")
def test_of_two_at_once_the_second_waits(official, contents, tmp_path, monkeypatch):
    second, flock, pool, fetched = threading.Event(), fetch.fcntl.flock, ThreadPoolExecutor(), []

    def comes(descriptor, operation):
        second.set()
        flock(descriptor, operation)

    def answer(handler):  # the first is at work when the second comes to the lock
        official.answers.clear()
        monkeypatch.setattr(fetch.fcntl, "flock", comes)
        fetched.append(pool.submit(fetch.fetch, "xnli", tmp_path))
        assert second.wait(60)
        handler.do_GET()

    official.answers["/XNLI-1.0.zip"] = answer
    fetch.fetch("xnli", tmp_path)
    fetched[0].result(60)
    assert below(tmp_path) == contents["xnli"]
    assert sorted(official.asked) == ["/XNLI-1.0.zip", "/XNLI-1.0.zip", "/XNLI-MT-1.0.zip"]  # do_GET counts it again


def test_two_at_once_where_nothing_can_be_locked_each_have_a_whole_file(official, contents, tmp_path, monkeypatch):
    """They get two versions of the file at the same time, half by half: one of them has the name in the end."""
    monkeypatch.setattr(fetch, "fcntl", None)
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # these threads stand for processes
    name, both, pool = fetch.SOURCES["mlqa"][1].files[0], threading.Barrier(2, timeout=60), ThreadPoolExecutor()
    versions = [contents["mlqa"][name], contents["mlqa"][name].replace(b"animals", b"ANIMALS")]
    left = list(versions)

    def answer(handler):
        content = left.pop()
        handler.start(content)
        for part in (content[:50], content[50:]):
            both.wait()
            handler.wfile.write(part)

    monkeypatch.setitem(fetch.SOURCES, "mlqa", fetch.SOURCES["mlqa"][1:2])
    official.answers[f"/{Path(name).name}"] = answer
    for fetched in [pool.submit(fetch.fetch, "mlqa", tmp_path) for _ in range(2)]:
        fetched.result(60)
    found = below(tmp_path)
    assert not left and [*found] == [name] and found[name] in versions


@pytest.mark.skipif(fetch.fcntl is None, reason="no locks of folders")
def test_what_a_kill_leaves_is_tidied(official, contents, start_command, tmp_path):
    folder = tmp_path / "data"
    code = f"""if True:
        from dataclasses import replace
        from paper import fetch
        first, *_ = fetch.SOURCES["xnli"]
        fetch.SOURCES["xnli"] = (replace(first, url="{official.url}/XNLI-1.0.zip"),)
        fetch.fetch("xnli", r"{folder}")"""
    official.answers["/XNLI-1.0.zip"] = lambda handler: half(handler, then=process.kill)
    process = start_command("", code=code)
    assert process.wait(120) < 0
    assert [path.name[:7] for path in folder.iterdir()] == [".fetch-"]
    official.answers.clear()
    fetch.fetch("xnli", folder)
    assert below(folder) == contents["xnli"] and not [*folder.glob(".fetch-*")]


# --- models --------------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_hub(server, make_model, tmp_path, monkeypatch):
    """The server as the Hub, with one small model whose pieces have a known hash; an empty cache in tmp_path/cache."""
    model = make_model(num_hidden_layers=1)
    server.model = {name: (model / name).read_bytes() for name in fetch.MODEL_FILES}
    server.files |= {f"/FacebookAI/{BASE}/resolve/main/{name}": content for name, content in server.model.items()}
    pieces = data.file_sha256(model / "sentencepiece.bpe.model")
    monkeypatch.setitem(fetch.MODELS, BASE, {"sentencepiece.bpe.model": pieces})
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache"),
              "HF_HUB_DISABLE_IMPLICIT_TOKEN": True}  # fmt: skip
    for name, value in values.items():  # in a new process the environment sets them
        monkeypatch.setattr(hub.constants, name, value)
    close = getattr(hub, "close_session", lambda: None)  # its connections remember the proxies of before
    close()
    yield server
    close()


@pytest.mark.parametrize("how", ["link", "copy", "another fetch is faster"])
def test_a_model_comes_from_the_cache(on_the_hub, tmp_path, monkeypatch, how):
    link = os.link

    def no_link(content, place):
        if how != "copy":
            link(content, place)
        if how != "link":
            raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    for name in "aab":
        fetch.fetch(BASE, out=tmp_path / name)
        assert below(tmp_path / name) == on_the_hub.model
    assert len([path for path in on_the_hub.asked if "resolve" in path]) == 3
    shared = (tmp_path / "a" / "model.safetensors").samefile(tmp_path / "b" / "model.safetensors")
    assert shared == (how != "copy")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_what_is_advised_for_a_damaged_model_mends_it(on_the_hub, tmp_path, file):
    folder = tmp_path / "model"
    fetch.fetch(BASE, out=folder)
    (folder / file).unlink()  # (its content has a second name in the cache)
    (folder / file).write_bytes(on_the_hub.model[file][:100])
    with pytest.raises(
        InputError, match=rf"{file}.*: not .*remove it, then .*`python -m paper fetch {BASE} --out DIR`"
    ):
        load(folder, ("a", "b"))
    (folder / file).unlink()
    fetch.fetch(BASE, out=folder)
    load(folder, ("a", "b"))


@pytest.mark.parametrize(
    ("file", "how", "says"),
    [("config.json", "page", "is not XLM-R's config.json"), ("sentencepiece.bpe.model", "cut", "has the SHA-256 "),
     ("sentencepiece.bpe.model", "page", "is not XLM-R's SentencePiece model"),
     ("model.safetensors", "cut", "is not a whole safetensors file")],
)  # fmt: skip
def test_a_file_of_a_model_that_is_not_what_it_should_be_leaves_the_cache_too(
    on_the_hub, tmp_path, monkeypatch, file, how, says
):
    if "SHA" not in says:
        monkeypatch.setitem(fetch.MODELS, BASE, {})
    path, folder = f"/FacebookAI/{BASE}/resolve/main/{file}", tmp_path / "model"
    good = on_the_hub.files[path]
    on_the_hub.files[path] = PAGE if how == "page" else good[:-10]
    message = fails(BASE, f"{file}, from {on_the_hub.url}{path}, {says}", "huggingface_hub's cache", out=folder)
    assert message.endswith(f"put it at {folder / file}")
    assert file not in below(folder) and on_the_hub.files[path] not in below(tmp_path / "cache").values()
    on_the_hub.files[path] = good  # under the same tag
    fetch.fetch(BASE, out=folder)
    assert below(folder) == on_the_hub.model


NO_NETWORK = [("gone", "404"), ("cut", ""), ("no network", "refused")]


@pytest.mark.parametrize(
    ("what", "how", "says"),
    [(what, *case) for what in ("ner", BASE) for case in NO_NETWORK] + [(BASE, "a page", "Hub")],
)
def test_when_the_network_fails(official, on_the_hub, tmp_path, what, how, says):
    path = {"ner": "/panx_dataset.zip", BASE: f"/FacebookAI/{BASE}/resolve/main/config.json"}[what]
    place = tmp_path / "here" / Path(path).name
    if how == "gone":
        del official.files[path]
    if how == "cut":
        official.answers[path] = half
    if how == "no network":
        official.shutdown()
        official.server_close()
    if how == "a page":  # of whoever is in between: no commit, no tag
        official.RequestHandlerClass = type("Page", (Handler,), {"send_header": lambda self, name, value: None})
    begin = f"{place.name} could not be fetched from {official.url}{path} ("
    message = fails(what, begin, says, data=place.parent, out=place.parent)
    assert message.endswith(f"try again later, or fetch it by hand and put it at {place}") and not below(place.parent)


def test_the_hubs_environment_counts(on_the_hub, run_command, tmp_path, monkeypatch):
    """HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE: from a mirror, then without a network out of the cache."""
    code = """import sys
from paper import fetch
fetch.MODELS = dict.fromkeys(fetch.MODELS, {})
for name, out in zip(sys.argv[1::2], sys.argv[2::2]):
    fetch.fetch(name, out=out)"""
    monkeypatch.setenv("HF_ENDPOINT", on_the_hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run_command(BASE, tmp_path / "a", code=code).status == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    on_the_hub.files.clear()
    result = run_command(BASE, tmp_path / "b", "xlm-roberta-large", tmp_path / "c", code=code)
    error, _, message = result.err.splitlines()[-1].partition(": ")
    assert below(tmp_path / "a") == below(tmp_path / "b") == on_the_hub.model
    assert (
        f"from {on_the_hub.url}/FacebookAI/" in message and "HF_HUB_OFFLINE" in message and error == "data.InputError"
    )


# --- what is asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "package"), [("xnli", "pooch"), (BASE, "huggingface_hub")])
def test_without_the_packages(monkeypatch, tmp_path, what, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"`pip install -r requirements-fetch.txt`$"):
        fetch.fetch(what, tmp_path, tmp_path)
    listed = (Path(fetch.__file__).parent.parent / "requirements-fetch.txt").read_text()
    assert package in listed and not below(tmp_path)


def test_other_names():
    fails("multilingual-e5-small", "`python -m demo.e5` makes it")
    fails("bert", "'bert'; there are xnli, ")


def test_the_command_line(official, contents, run_main, tmp_path):
    assert run_main("fetch", "xnli", "--data", tmp_path / "data").status == 0
    assert below(tmp_path / "data") == contents["xnli"]
