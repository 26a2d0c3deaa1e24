"""XLM-R and the official data, fetched: models with huggingface_hub, archives and single files with pooch.

    fetch("xnli")                   # what data.load_xnli reads, into data/
    fetch("xlm-roberta-base")       # into models/xlm-roberta-base, from huggingface_hub's cache where it is there

What is there is not fetched again. What arrives is opened and checked before it gets its name, so that nothing half,
damaged or foreign ever has it: data in a scratch folder inside the data folder, models in huggingface_hub's cache.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

import data as official
from data import InputError, Tokenizer, file_sha256, whole_file
from model import read_config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass(frozen=True)
class Source:
    """An archive, or a single JSON file, and the files in the data folder that come of it."""

    url: str  # the name alone where no server has it any more
    files: tuple
    limit: int = 0  # of an archive: megabytes that its files may have, about three times what they are known to have

    @property
    def name(self):
        return self.url.rpartition("/")[2]

    @property
    def is_archive(self):
        return self.name.endswith((".zip", ".tar.gz"))


def _mlqa(split):
    pairs = [(x, y) for x in official.MLQA_LANGUAGES for y in official.MLQA_LANGUAGES]
    return tuple(f"MLQA_V1/{split}/{split}-context-{x}-question-{y}.json" for x, y in pairs)


_QAM = ("en.train", *(f"{x}.{split}" for x in ("en", "de", "fr") for split in ("dev", "test")))
_WIKIANN = tuple(f"panx_dataset/{x}.tar.gz" for x in official.NER_LANGUAGES)
SOURCES = {  # the Makefile looks for the last file of each
    "xnli": (
        Source(f"{official.XNLI_URL}/XNLI-1.0.zip", ("XNLI-1.0/xnli.dev.tsv", "XNLI-1.0/xnli.test.tsv"), 500),
        Source(f"{official.XNLI_URL}/XNLI-MT-1.0.zip", ("XNLI-MT-1.0/multinli/multinli.train.en.tsv",), 300),
    ),
    "mlqa": (
        Source(f"{official.MLQA_URL}/MLQA_V1.zip", _mlqa("dev") + _mlqa("test"), 1000),
        *(Source(f"{official.XQUAD_URL}/xquad.{x}.json", (f"xquad/xquad.{x}.json",)) for x in official.MLQA_LANGUAGES),
        *(Source(f"{official.SQUAD_URL}/{x}-v1.1.json", (f"squad/{x}-v1.1.json",)) for x in ("dev", "train")),
    ),
    "ner": (Source(f"{official.WIKIANN_URL}/panx_dataset.zip", _WIKIANN, 500),),
    "qam": (Source("xglue_full_dataset.tar.gz", tuple(f"xglue/QAM/xglue.qam.{x}" for x in _QAM), 500),),
}
# As Hugging Face's datasets and others recorded them. (XQuAD's files lie on a branch, where they may yet be mended.)
SHA256 = {
    "XNLI-1.0.zip": "4ba1d5e1afdb7161f0f23c66dc787802ccfa8a25a3ddd3b165a35e50df346ab1",
    "XNLI-MT-1.0.zip": "f732517ba2fb1d550e9f3c2aabaef6017c91ee2dcec90e878f138764d224db05",
    "MLQA_V1.zip": "246e8089933d13007fe80684d5c5c0713d6834cf8b3b4a0ec7c66f0a0d2baac8",
    "dev-v1.1.json": "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
    "train-v1.1.json": "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    "panx_dataset.zip": "164814b64f749ad000988b5ab45050b5116913b3db466ab173008955ddf649a4",
}
_PIECES = "cfc8146abe2a0488e9e2a0c56de7952f7c11ab059eca145a0a727afce0db2865"  # one vocabulary for all sizes
_BASE = "6fd4797bc397c3b8b55d6bb5740366b57e6a3ce91c04c77f22aafc0c128e6feb"
MODELS = {  # FacebookAI's on the Hub, and the SHA-256 of their files where known
    "xlm-roberta-base": {"sentencepiece.bpe.model": _PIECES, "model.safetensors": _BASE},
    "xlm-roberta-large": {"sentencepiece.bpe.model": _PIECES},
}
MODEL_FILES = {  # what each should be, and what opens it; the Makefile looks for the last
    "config.json": ("XLM-R's config.json", read_config),
    "sentencepiece.bpe.model": ("XLM-R's SentencePiece model", Tokenizer),
    "model.safetensors": ("a whole safetensors file", lambda path: safe_open(path, "np")),
}
NAMES = (*SOURCES, *MODELS)
RETRIES = 2  # of a download of data; huggingface_hub has its own
_MISSING = "fetching needs huggingface_hub and pooch: `pip install -r requirements-fetch.txt`"
_LATER = "try again later, or fetch it by hand and put it at"


def fetch(what, data="data", out=None):
    """Fetches a task's official files into the folder `data`, or a model into `out` (models/NAME), unless there.

    what: one of NAMES. Raises InputError, which says how to go on by hand, for what cannot be had or is not what it
    should be; then nothing has its name. An archive that was put into `data` by hand is used, and stays.
    """
    if what in MODELS:
        return _fetch_model(what, Path(out or f"models/{what}"))
    if what == "multilingual-e5-small":
        raise InputError(f"{what} is not fetched but made: `python -m demo.e5` makes it")
    if what not in SOURCES:
        raise InputError(f"nothing to fetch is called {what!r}; there are {', '.join(NAMES)}")
    for source in SOURCES[what]:
        if _lacking(source, Path(data)):
            with _scratch(Path(data)) as scratch:
                _fetch_source(source, Path(data), scratch)


# --- data ----------------------------------------------------------------------------------------------------


def _lacking(source, data):
    """Those of the source's files that are not there; QAM's xglue.qam.en.dev also goes by the name en.dev.tsv."""
    files = [(file, data / file) for file in source.files]
    tsv = {file: path.with_name(path.name.removeprefix("xglue.qam.") + ".tsv") for file, path in files}
    return [file for file, path in files if not path.is_file() and not tsv[file].is_file()]


def _fetch_source(source, data, scratch):
    files = _lacking(source, data)
    if not files:
        return  # another fetch was at work meanwhile
    place = data / (source.name if source.is_archive else source.files[0])  # where a copy that is fetched by hand goes
    by_hand = place.is_file()
    if not by_hand and source.url == source.name:
        raise InputError(f"{data / files[0]} is not there: {official.GET_QAM}, or put the archive at {place}")
    file = place if by_hand else _download(source, scratch, place)
    try:
        parts = _unpack(file, files, source.limit, scratch) if source.is_archive else {files[0]: _check_squad(file)}
    except _Unfit as unfit:
        if by_hand:
            raise InputError(f"{place} {unfit}: remove it and fetch it again") from None
        raise InputError(f"{source.name}, from {source.url}, {unfit}: it is removed; {_LATER} {place}") from None
    for name, part in parts.items():
        with whole_file(data / name) as whole:
            os.replace(part, whole)


def _download(source, scratch, place):
    """The source's file, in `scratch`: whole where the server says how long it is, the right one where we know it."""
    try:
        import pooch
    except ImportError:
        raise InputError(_MISSING) from None
    registry, urls = {source.name: SHA256.get(source.name)}, {source.name: source.url}
    files = pooch.create(scratch, base_url="", registry=registry, urls=urls, retry_if_failed=RETRIES)
    with _network(source.url, place):
        plain = {"Accept-Encoding": "identity"}  # so that the length is the file's
        web = pooch.HTTPDownloader(sys.stderr.isatty(), chunk_size=1 << 20, timeout=60, headers=plain)
        return Path(files.fetch(source.name, downloader=web))


class _Unfit(Exception):
    """A file is not what it should be: in what."""


def _unpack(archive, files, limit, scratch):
    """The members of a zip or tar.gz archive that are called as `files` are, in any folder: {file: path in scratch}.

    Raises _Unfit if the archive is broken or lacks one, or if they have more than `limit` megabytes.
    """
    kind, parts = "tar.gz" if archive.name.endswith(".tar.gz") else "zip", {}
    try:
        with _open_archive(archive, kind) as (members, open_member):
            there = {PurePosixPath(name).name: (member, size) for name, member, size in members}
            wanted = {file: there.get(PurePosixPath(file).name) for file in files}
            if lacking := [file for file in files if not wanted[file]]:
                raise _Unfit(f"lacks {', '.join(lacking[:3])}")
            if sum(size for _, size in wanted.values()) > limit * 10**6:  # no more than `size` is ever read of a member
                raise _Unfit(f"would unpack to more than {limit} MB, far more than it has")
            for file, (member, _) in wanted.items():
                parts[file] = scratch / f"{len(parts)}.part"
                with open_member(member) as source, open(parts[file], "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except _Unfit:
        raise
    except Exception as error:  # zipfile, tarfile and their decompressors have no one error for a broken archive
        if _is_of_the_disk(error):
            raise
        raise _Unfit(f"is not a whole {kind} archive ({str(error)[:200]})") from None
    return parts


@contextlib.contextmanager
def _open_archive(path, kind):
    """([(name, member, its size in bytes)], what opens a member)."""
    if kind == "zip":
        with zipfile.ZipFile(path) as file:
            yield [(m.filename, m, m.file_size) for m in file.infolist() if not m.is_dir()], file.open
    else:
        with tarfile.open(path, "r:gz") as file:
            members = [(m.name, m, m.size) for m in file if m.isfile()]
            while file.fileobj.read(1 << 20):  # to the end, where gzip's check sum stands
                pass
            yield members, file.extractfile


def _check_squad(file):
    """The file, if it is in SQuAD's format, as far as that tells it from a page of HTML and from half a file."""
    try:
        articles = json.loads(file.read_text(encoding="utf-8"))["data"]
        if not [qa["answers"] for article in articles for p in article["paragraphs"] for qa in p["qas"]]:
            raise ValueError("no question")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Unfit(f"is not in SQuAD's format ({type(error).__name__}: {error})") from None
    return file


# --- models --------------------------------------------------------------------------------------------------


def _fetch_model(name, folder):
    lacking = [file for file in MODEL_FILES if not (folder / file).is_file()]
    if not lacking:
        return
    try:
        from huggingface_hub import hf_hub_download, hf_hub_url
    except ImportError:
        raise InputError(_MISSING) from None
    folder.mkdir(parents=True, exist_ok=True)
    for file in lacking:
        place, url = folder / file, hf_hub_url(f"FacebookAI/{name}", file)
        with _network(url, place):
            cached = Path(hf_hub_download(f"FacebookAI/{name}", file))
        content = cached.resolve()  # in the cache a name is a link to the content
        try:
            _check_model_file(content, file, MODELS[name].get(file))
        except _Unfit as unfit:
            for path in {cached, content}:
                path.unlink()
            removed = "it is removed, from huggingface_hub's cache too"
            raise InputError(f"{file}, from {url}, {unfit}: {removed}; {_LATER} {place}") from None
        _link(content, place)


def _check_model_file(path, file, sha256):
    if sha256 and (found := file_sha256(path)) != sha256:
        raise _Unfit(f"has the SHA-256 {found}, not {sha256}")
    what, opens = MODEL_FILES[file]
    try:
        opens(path)
    except (InputError, SafetensorError):
        raise _Unfit(f"is not {what}") from None


def _link(content, place):
    """Gives a file of the cache a second name, at once; a copy where the file system has no such links."""
    try:
        os.link(content, place)
    except OSError:
        if not place.is_file():  # or another fetch was faster
            with _scratch(place.parent) as scratch, whole_file(place) as whole:
                os.replace(shutil.copyfile(content, scratch / place.name), whole)


# --- what both need ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _network(url, place):
    """Turns whatever the libraries raise into the one line for the user; errors of the disk stay what they are."""
    try:
        yield
    except Exception as error:  # they have no one error: requests', httpx', OSError, ValueError, RuntimeError
        if _is_of_the_disk(error):
            raise
        reason = error.__cause__ or error  # huggingface_hub's own words are general
        reason = str(reason) or type(reason).__name__
        raise InputError(f"{place.name} could not be fetched from {url} ({reason}): {_LATER} {place}") from None


def _is_of_the_disk(error):
    """Such as no space left. The libraries' own OSErrors have no number; EINVAL is an archive that points before its
    own start."""
    network = isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, OSError) and not network and error.errno not in (None, errno.EINVAL)


@contextlib.contextmanager
def _scratch(folder):
    """A new folder inside `folder`, gone at the end. One process at a time has one, where a folder can be locked: the
    lock goes with its process, whatever ends that, and the next tidies up. Elsewhere (Windows, some network disks) two
    fetch side by side, each for itself, and what a kill left stays."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = None
    try:
        with contextlib.suppress(OSError):
            if fcntl:
                lock = os.open(folder, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_EX)
                for left in folder.glob(".fetch-*"):
                    shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            yield Path(scratch)
    finally:
        if lock is not None:
            os.close(lock)
