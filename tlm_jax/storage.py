"""Folders in buckets: paths that begin with gs:// or s3:// beside those of the local machine.

`path` gives a `pathlib.Path` for a local path, with nothing in between, and for one in a bucket a
`BucketPath`, which has the same methods over fsspec (gcsfs, s3fs). A bucket has no folders,
renaming or appending: making a folder does nothing, renaming copies, and what grows is written by
`bucket_files.Log`. Writing a file replaces it in one step.

What fails raises `OSError` with one line of text, after the libraries' own tries with backoff.
"""

import contextlib
import errno
import fnmatch
import functools
import importlib
import io
import itertools
import logging
import os
import pathlib
import random
import re
import shutil
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

from tlm_jax.validation import UserError

COMMIT = "commit_success.txt"
"""Written last into a checkpoint in a bucket; without it there is none (Orbax's name)."""
_ROOTS = {"gs:": ("gcsfs", "gcs"), "s3:": ("s3fs", "s3")}  # library, extra
_BUCKET = re.compile(r"(gs|s3):/+(?=[^/])")
_OTHER = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TRIES = 5
_READ_SECONDS = 60.0  # without a byte
_LIBRARIES = {"gcsfs", "s3fs", "fsspec", "aiohttp", "requests", "botocore", "aiobotocore", "google"}
_T = TypeVar("_T")


def path(name: str | os.PathLike[str]) -> pathlib.Path:
    """The path with a name: a `BucketPath` for gs:// and s3://, else a `pathlib.Path`.

    Raises:
      UserError: an URL of another kind, or the library for this one is not installed.
    """
    text = os.fspath(name)
    if found := _BUCKET.match(text):
        _configure(f"{found[1]}:")
        return BucketPath(text)
    if _OTHER.match(text) or re.match(r"(gs|s3):/", text):
        raise UserError(
            f"{text} is not a path; it can be local, gs://BUCKET/... or s3://BUCKET/..."
        )
    return pathlib.Path(name)


def in_bucket(path: pathlib.Path) -> bool:
    """Whether a path is one in a bucket."""
    return isinstance(path, BucketPath)


@functools.cache
def _configure(root: str) -> None:
    """Imports the library for a kind of bucket and sets it up, for Orbax too."""
    library, extra = _ROOTS[root]
    # The extended one asks for the kind of each bucket by gRPC, which ordinary ones do not need.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        importlib.import_module(library)
    except ImportError:
        raise UserError(f"{root}// paths need {library}: pip install 'tlm-jax[{extra}]'") from None
    from fsspec.config import conf

    options: dict[str, Any] = {"use_listings_cache": False}  # others write there too
    if root == "gs:":
        import aiohttp

        options["requests_timeout"] = aiohttp.ClientTimeout(
            sock_connect=10, sock_read=_READ_SECONDS
        )
        if "STORAGE_EMULATOR_HOST" in os.environ:
            options["token"] = "anon"
    for protocol in ("gs", "gcs") if root == "gs:" else ("s3",):
        conf[protocol] = options | conf.get(protocol, {})
    logging.getLogger(library).setLevel(logging.CRITICAL)  # what it says is raised as well


def filesystem(path: pathlib.Path) -> Any:
    """The fsspec file system of a path in a bucket."""
    import fsspec

    root = path.parts[0]
    _configure(root)
    return fsspec.filesystem(root[:-1])


def tried(path: pathlib.Path, work: Callable[[], _T], *, writes: bool = False) -> _T:
    """What `work` returns; what it raises becomes an `OSError` that names `path`.

    The libraries themselves try again after most passing errors; timeouts are left to us.

    Args:
      path: what it works on.
      work: may be called several times.
      writes: then a missing object is a missing bucket.
    """
    for attempt in itertools.count():
        try:
            return work()
        except Exception as error:
            if isinstance(error, TimeoutError) and attempt + 1 < _TRIES:
                time.sleep(random.uniform(0.5, 1) * 2**attempt)
                continue
            found = _translated(error, path, writes=writes)
            if found is error:
                raise
            raise found from error
    raise AssertionError


def _translated(error: Exception, path: pathlib.Path, *, writes: bool) -> Exception:
    text = " ".join(str(error).split())[:200]
    code = str(getattr(error, "code", ""))
    if isinstance(error, FileNotFoundError):
        if writes:
            place = f"{path.parts[0]}//{path.parts[1]}"
            return FileNotFoundError(errno.ENOENT, f"there is no bucket {place}", str(path))
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if isinstance(error, PermissionError) or text.startswith("Forbidden") or code in ("401", "403"):
        text = " ".join(str(error).partition("\n")[2].split()) or text  # after gcsfs's own line
        return PermissionError(errno.EACCES, f"permission denied ({text})", str(path))
    if isinstance(error, FileExistsError):
        return error
    if isinstance(error, ValueError) and text.startswith("Bad Request"):
        return OSError(errno.EINVAL, text, str(path))
    if type(error).__module__.split(".")[0] in _LIBRARIES or isinstance(error, OSError):
        name = type(error).__name__
        return OSError(errno.ENETUNREACH, f"cannot be reached ({text or name})", str(path))
    return error


def refused(error: BaseException) -> str:
    """Why a bucket could not be read or written, if a library that was not called here says so.

    Empty for a missing object, and for all that has nothing to do with buckets.
    """
    library = type(error).__module__.split(".")[0] in _LIBRARIES
    if not isinstance(error, Exception) or not (library or str(error).startswith("Forbidden")):
        return ""
    return str(getattr(_translated(error, BucketPath(), writes=False), "strerror", ""))


@functools.cache
def _require_bucket(root: str, bucket: str) -> None:
    place = BucketPath(root, bucket)
    try:
        filesystem(place).info(f"{bucket}")
    except FileNotFoundError:
        raise _translated(FileNotFoundError(), place, writes=True) from None
    except Exception:  # it may be readable without the permission to ask
        return


class BucketPath(pathlib.PosixPath):
    """A path in a bucket; what is not defined here is pathlib's, and needs no access.

    A path that a listing gave knows the kind, size and time that it had then.
    """

    _listed: dict[str, Any] | None = None

    def __str__(self) -> str:
        parts = self.parts
        if not parts or parts[0] not in _ROOTS:  # relative to another
            return super().__str__()
        return f"{parts[0]}//{'/'.join(parts[1:])}"

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    @property
    def bucket(self) -> str:
        return self.parts[1]

    @property
    def key(self) -> str:
        """The name in the bucket."""
        return "/".join(self.parts[2:])

    @property
    def place(self) -> str:
        """Bucket and key, as fsspec names it."""
        return "/".join(self.parts[1:])

    @property
    def fs(self) -> Any:
        return filesystem(self)

    def absolute(self) -> Self:
        return self

    def resolve(self, strict: bool = False) -> Self:
        return self

    def expanduser(self) -> Self:
        return self

    def _info(self) -> dict[str, Any] | None:
        if self._listed is not None:
            return self._listed
        try:
            return tried(self, lambda: self.fs.info(self.place))
        except FileNotFoundError:
            _require_bucket(self.parts[0], self.bucket)
            return None

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Size and time of the last change, the only things known."""
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        changed = info.get("mtime") or info.get("LastModified")
        seconds = changed.timestamp() if changed else 0.0
        return types.SimpleNamespace(
            st_size=info.get("size") or 0, st_mtime=seconds, st_mtime_ns=int(seconds * 1e9)
        )

    def _of(self, info: dict[str, Any]) -> Self:
        found = type(self)(f"{self.parts[0]}//{info['name'].rstrip('/')}")
        found._listed = info
        return found

    def iterdir(self) -> Iterator[Self]:  # type: ignore[override]
        """What is in the folder; nothing if it is not there, as after `mkdir`."""
        try:
            found = [self._of(info) for info in tried(self, lambda: self.fs.ls(self.place, True))]
        except FileNotFoundError:
            _require_bucket(self.parts[0], self.bucket)
            return iter(())
        if any(one == self and one.is_file() for one in found):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))
        return iter(one for one in found if one != self)

    def glob(self, pattern: str, **_: Any) -> Iterator[Self]:  # type: ignore[override]
        first, _slash, rest = pattern.partition("/")
        with contextlib.suppress(NotADirectoryError):
            if first == "**":  # this folder, or any below
                yield from self.glob(rest or "*")
            for one in self.iterdir():
                if first == "**" and one.is_dir():
                    yield from one.glob(pattern)
                elif first != "**" and fnmatch.fnmatchcase(one.name, first):
                    yield from one.glob(rest) if rest else [one]

    def rglob(self, pattern: str, **_: Any) -> Iterator[Self]:  # type: ignore[override]
        """Files below, however deep, whose names match."""
        found = tried(self, lambda: self.fs.find(self.place, detail=True))
        for info in found.values():
            one = self._of(info)
            if fnmatch.fnmatchcase(one.name, pattern) and not info["name"].endswith("/"):
                yield one

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder is there while there are files in it."""

    def read_bytes(self) -> bytes:
        return tried(self, lambda: self.fs.cat_file(self.place))

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        """Replaces the file, in one step."""
        content = bytes(data)
        tried(self, lambda: self.fs.pipe_file(self.place, content), writes=True)
        return len(content)

    def write_text(self, data: str, *_: Any, **__: Any) -> int:
        return self.write_bytes(data.encode())

    def open(  # type: ignore[override]
        self, mode: str = "r", buffering: int = -1, encoding: str | None = None, **options: Any
    ) -> Any:
        """Opens for reading; what is written is written whole (`write_bytes`)."""
        if set(mode) - set("rbt"):
            raise OSError(errno.ENOTSUP, f"mode {mode!r} is not possible in a bucket", str(self))
        file = io.BufferedReader(_Reader(self), 2**20)
        return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", **options)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            tried(self, lambda: self.fs.rm_file(self.place))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: Any) -> "BucketPath":
        """Copies a file, or all in a folder, and then removes what was copied."""
        target = path(target)
        inside = list(self.rglob("*")) if self.is_dir() else [self]
        for one in inside:
            to = target / one.relative_to(self)
            tried(one, functools.partial(self.fs.cp_file, one.place, to.place), writes=True)
        for one in inside:
            one.unlink(missing_ok=True)
        return target

    replace = rename


class _Reader(io.RawIOBase):
    """A file in a bucket; fsspec reads ahead."""

    def __init__(self, path: BucketPath) -> None:
        self._path = path
        self._file = tried(path, lambda: path.fs.open(path.place, "rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        at = self._file.tell()

        def read() -> bytes:
            self._file.seek(at)
            return self._file.read(len(buffer))

        found = tried(self._path, read)
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def remove_tree(folder: pathlib.Path) -> None:
    """Removes a folder and all in it, if it is there; what cannot be removed stays."""
    if not isinstance(folder, BucketPath):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        tried(folder, lambda: folder.fs.rm(folder.place, recursive=True))


def upload(source: pathlib.Path, target: pathlib.Path, *, last: Sequence[str] = ()) -> None:
    """Copies a local file, or all in a local folder, to a bucket.

    Args:
      source: on this machine.
      target: in a bucket.
      last: names of files that make a folder valid: they come last, in this order, and those of
        folders inside first.
    """
    assert isinstance(target, BucketPath)
    if source.is_file():
        tried(target, lambda: target.fs.put_file(str(source), target.place), writes=True)
        return
    found = [f for f in sorted(source.rglob("*")) if f.is_file()]
    found.sort(key=lambda f: (last.index(f.name) if f.name in last else -1, -len(f.parts)))
    ready = [f for f in found if f.name not in last]
    for group in ([ready] if ready else []) + [[f] for f in found if f.name in last]:
        to = [(target / f.relative_to(source)).place for f in group]
        here = [str(f) for f in group]
        tried(target, functools.partial(target.fs.put, here, to), writes=True)


def download(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file in a bucket, or all in a folder there, to this machine."""
    assert isinstance(source, BucketPath)
    files = list(source.rglob("*")) if source.is_dir() else [source]
    to = [target / f.relative_to(source) for f in files]
    for one in to:
        one.parent.mkdir(parents=True, exist_ok=True)
    places = [f.place for f in files]
    tried(source, lambda: source.fs.get(places, [str(one) for one in to]))


@contextlib.contextmanager
def local(source: pathlib.Path) -> Iterator[pathlib.Path]:
    """The path itself, or a copy on this machine of what is in a bucket, removed at the end.

    For libraries that read only local files. Errors that name the copy name the original.
    """
    if not in_bucket(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="tlm-") as name:
        copy = pathlib.Path(name) / source.name
        if source.exists():
            download(source, copy)
        try:
            yield copy
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(source))) from error
