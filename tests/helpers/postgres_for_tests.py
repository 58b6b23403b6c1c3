"""A PostgreSQL server of the tests' own: made in a temporary folder, on a free port, gone afterwards."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# PostgreSQL refuses to run as root: where the tests do, the server belongs to one of these.
_USERS = ("postgres", "nobody")


@dataclass(frozen=True)
class Cluster:
    """A running server; every database in it has the name that it is asked for."""

    folder: Path
    binaries: Path
    port: int
    user: str | int | None

    def run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.binaries / program, *arguments],
            check=True,
            user=self.user,
            extra_groups=None if self.user is None else [],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(self.folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )

    def start(self) -> None:
        # Without fsync: it guards against a machine's loss of power, and the tests kill processes only.
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off -c max_connections=60"
        self.run(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start"
        )

    def stop(self, how: str = "fast") -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", how, "-w", "stop")

    def make_database(self, name: str) -> str:
        """Make a database; return its address."""
        self.run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tester", name)
        return f"postgresql://tester@127.0.0.1:{self.port}/{name}"


def binaries() -> Path | None:
    """The newest folder with PostgreSQL's programs, where Debian or PATH has one."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    initdb = shutil.which("initdb")
    return None if initdb is None else Path(initdb).resolve().parent


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Yield a server; `binaries()` must have found its programs."""
    programs = binaries()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="everalign-postgres-", dir="/tmp"))
    user = _other_user() if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
    cluster = Cluster(folder, programs, _free_port(), user)
    # The pipe to it closes when this process ends, in whatever way: the server ends with it.
    guard = subprocess.Popen(
        ["sh", "-c", 'read -r _; "$0" -D "$1/data" -m immediate -w stop; rm -rf "$1"', programs / "pg_ctl", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=user,
        extra_groups=None if user is None else [],
        cwd="/",
        start_new_session=True,
    )
    with guard:
        cluster.run("initdb", "-D", str(folder / "data"), "-U", "tester", "-A", "trust", "-N", "-E", "UTF8")
        cluster.start()
        yield cluster


def _other_user() -> str:
    known = [line.partition(":")[0] for line in Path("/etc/passwd").read_text().splitlines()]
    return next(user for user in _USERS if user in known)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
