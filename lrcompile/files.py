"""Files that appear complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lrcompile.errors import LrcompileError, ResourceError, UsageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
MISPLACED = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EEXIST,
    }
)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits; reads it in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(path: str | os.PathLike[str], files: Iterable[str | os.PathLike[str]]) -> str:
    """The SHA-256 of a file, or of a folder's ``files``: over their names and contents, in order of their names."""
    if os.path.isfile(path):
        return sha256(path)
    lines = sorted(f"{Path(file).name} {sha256(file)}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def made_folder(path: Path) -> Iterator[Path]:
    """The folder, created with its parents where it is missing; what was created goes again if the block fails.

    Raises:
        UsageError: it cannot be created there.
        ResourceError: the disk is full.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except BaseException as error:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and error.filename in map(str, (path, *missing)):
            raise write_error(error, path) from error
        raise


def system_error(error: Exception, path: str | os.PathLike[str]) -> OSError:
    """The ``OSError`` behind an error of a library that says ``(os error 28)`` in its text only."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, str(error), os.fspath(path))


def write_error(error: OSError, where: str | os.PathLike[str]) -> LrcompileError:
    """The typed error for a failed write: exit code 7 for a full or broken disk, 2 for a wrong place."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in FULL:
        return ResourceError(f"cannot write: {reason}", where=str(where), hint="free some space, or write elsewhere")
    if error.errno in MISPLACED:
        hint = "create the folder first" if error.errno == errno.ENOENT else "choose an output that you may write"
        return UsageError(f"cannot write: {reason}", where=str(where), hint=hint)
    return ResourceError(f"cannot write: {reason}", where=str(where), hint="check the disk")


@dataclass
class _Undo:
    """How to take one rename back; ``old`` is a second name of the file that was replaced."""

    final: Path
    staged: Path
    old: Path | None
    replaced: bool

    def __call__(self) -> None:
        if self.old is not None:
            os.replace(self.old, self.final)
        elif not self.replaced and not self.staged.exists():
            self.final.unlink(missing_ok=True)


class AtomicSet:
    """A graph, its data file and its reports, published together when the block ends without an exception.

    Everything is written under temporary names in the folder of ``target``, synced, and renamed; the target
    comes last. An exception (``KeyboardInterrupt`` too) removes every trace. A data file gets a name made
    from its content, so it never overwrites the one that an old graph still reads: a kill at any moment
    leaves the old graph with its data or the new graph with its data. (A kill may leave temporary files.)

    ::

        with AtomicSet(out, inputs=[model], force=force) as files:
            data = files.stage_data()         # write the weights there …
            location = files.seal(data)       # … then refer to them by this name
            save_graph(files.path, location)  # a check may load files.path before the block ends
            write_report(files.stage("model.report.json"))

    Args:
        target: where the graph goes; replaced as a name, so a link's own target is never written to.
        inputs: files that were read; a target that is one of them needs ``force``.
        force: replace files that exist.

    Raises:
        UsageError: a file exists or is an input and ``force`` is not set; the folder is missing or not writable.
        ResourceError: the disk is full or failed.
    """

    def __init__(
        self, target: str | os.PathLike[str], *, inputs: Iterable[str | os.PathLike[str]] = (), force: bool = False
    ) -> None:
        self.target = Path(target)
        self.folder = self.target.parent
        self.force = force
        self.inputs = [Path(path) for path in inputs]
        self._staged: dict[Path, Path] = {}
        self._data: set[Path] = set()
        self._created: list[Path] = []
        self._undo: list[_Undo] = []
        self._trash: list[Path] = []

    def __enter__(self) -> AtomicSet:
        self.path = self.stage(self.target.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            try:
                self._commit()
            except BaseException as failure:
                self._roll_back()
                if isinstance(failure, OSError):
                    raise write_error(failure, self.target) from failure
                raise
        else:
            mine = isinstance(error, OSError) and self._concerns(error)
            self._roll_back()
            if mine and isinstance(error, OSError):
                raise write_error(error, self.target) from error

    def stage(self, name: str) -> Path:
        """The temporary path of a file that will be called ``name`` beside the target.

        Raises:
            UsageError, ResourceError: see the class.
        """
        if not name or name in (".", "..") or Path(name).name != name:
            raise UsageError("needs a file name, not a path", where=name or str(self.target))
        final = self.folder / name
        if final not in self._staged:
            self._check(final)
            self._staged[final] = self._temporary(name)
            self._create(self._staged[final])
        return self._staged[final]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is staged or sealed so far."""
        paths = {*self._staged.values(), *self._data, *self._created}
        return sum(path.stat().st_size for path in paths if path.exists())

    def stage_data(self) -> Path:
        """The temporary path of a data file; ``seal`` gives it its name."""
        path = self._temporary(self.target.name)
        self._data.add(path)
        self._create(path)
        return path

    def seal(self, path: Path) -> str:
        """Syncs a data file and names it by its content; returns the name, relative to the target's folder.

        The file stands under its final name from now on, so that the staged graph can be loaded and checked.
        """
        try:
            digest = sha256(path)
            final = self.folder / f"{self.target.name}.{digest[:16]}.data"
            if final.is_file() and not final.is_symlink() and sha256(final) == digest:
                path.unlink()
            else:
                _sync(path)
                if not os.path.lexists(final):
                    self._created.append(final)
                os.replace(path, final)
            self._data.discard(path)
        except OSError as error:
            raise write_error(error, self.target) from error
        return final.name

    def _check(self, final: Path) -> None:
        for source in self.inputs:
            if not self.force and final.exists() and source.exists() and final.samefile(source):
                raise UsageError("the output is the input", where=str(final), hint="--force replaces it")
        if final.is_dir() and not final.is_symlink():
            raise UsageError("the output is a folder", where=str(final), hint="give the name of a file")
        if not self.force and os.path.lexists(final):
            raise UsageError("the output exists already", where=str(final), hint="--force replaces it")

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name[:150]}.{secrets.token_hex(6)}.tmp{self.target.suffix[:20]}"

    def _create(self, path: Path) -> None:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except OSError as error:
            self._roll_back()
            raise write_error(error, self.target) from error

    def _commit(self) -> None:
        if self._data:
            raise ValueError("a data file was staged but not sealed")
        old_data = self._old_data()
        for staged in self._staged.values():
            _sync(staged)
        _sync(self.folder)  # the data files' names reach the disk before the graph that needs them
        for final, staged in sorted(self._staged.items(), key=lambda item: item[0] == self.target):
            self._check(final)
            self._publish(staged, final)
        _sync(self.folder)
        self._undo, self._created = [], []  # from here on there is no way back
        self._trash += self._unused(old_data)
        self._roll_back()

    def _publish(self, staged: Path, final: Path) -> None:
        undo = _Undo(final, staged, None, os.path.lexists(final))
        self._undo.append(undo)
        if undo.replaced:
            old = self.folder / f"{staged.name}.old"
            self._trash.append(old)
            with suppress(OSError):  # not every file system has hard links; without one the rename stays
                os.link(final, old, follow_symlinks=False)
                undo.old = old
            if not final.is_symlink():
                with suppress(OSError):
                    os.chmod(staged, stat.S_IMODE(final.stat().st_mode))
        os.replace(staged, final)

    def _roll_back(self) -> None:
        for undo in reversed(self._undo):
            with suppress(OSError):
                undo()
        for path in [*self._staged.values(), *self._data, *self._created, *self._trash]:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        self._staged, self._data, self._created, self._undo, self._trash = {}, set(), [], [], []

    def _concerns(self, error: OSError) -> bool:
        """Whether an error of the caller's own writing is about this set's folder (and not, say, about reading)."""
        if error.errno in FULL:
            return True
        mine = {str(path) for path in [*self._staged.values(), *self._data]}
        return error.filename is not None and os.fsdecode(error.filename) in mine

    def _old_data(self) -> list[Path]:
        """Data files of our own naming that the graph about to be replaced refers to."""
        if not self.target.is_file() or self.target.is_symlink():
            return []
        pattern = re.compile(re.escape(self.target.name) + r"\.[0-9a-f]{16}\.data")
        mine = [path for path in self.folder.iterdir() if pattern.fullmatch(path.name) and path.is_file()]
        return [path for path in mine if _mentions(self.target, path.name)]

    def _unused(self, data: list[Path]) -> list[Path]:
        """Those that no graph in the folder refers to."""
        try:
            graphs = [p for p in self.folder.iterdir() if p.suffix in {".onnx", self.target.suffix} and p.is_file()]
            return [path for path in data if not any(_mentions(graph, path.name) for graph in graphs)]
        except OSError:
            return []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mentions(graph: Path, name: str) -> bool:
    with open(graph, "rb") as stream:
        if not os.fstat(stream.fileno()).st_size:
            return False
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return view.find(name.encode()) >= 0
