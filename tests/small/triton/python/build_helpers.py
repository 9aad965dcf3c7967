"""Fetch what the build needs, as the real script does: into TRITON_CACHE_PATH, by urllib, each
folder with a note of its address.
"""

import io
import json
import platform
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

CMAKE = Path(__file__).resolve().parent.parent / "cmake"
NVIDIA = "https://developer.download.nvidia.com/compute/cuda/redist"


def provide(url, folder):
    note = folder / "version.txt"
    if note.exists() and note.read_text() == url:
        return
    print(f"downloading and extracting {url} ...", file=sys.stderr, flush=True)
    with urllib.request.urlopen(urllib.request.Request(url, None, {}), timeout=5) as answer:
        content = io.BytesIO(answer.read())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if url.endswith(".zip"):
        zipfile.ZipFile(content).extractall(folder)
    else:
        # Python 3.11.2, which Debian 12 has, lacks tarfile's filters.
        subprocess.run(
            ["tar", "-xzf", "-", "--no-same-owner", "-C", folder],
            input=content.getvalue(),
            check=True,
        )
    note.write_text(url)


def main(cache, llvm, json_folder):
    system = {"x86_64": "ubuntu-x64", "aarch64": "ubuntu-arm64"}[platform.machine()]
    info = json.loads((CMAKE / "llvm-info.json").read_text())
    name = f"llvm-{info['llvm_hash'][:8]}-{system}-{info['build_number']}"
    if not llvm:
        base = "https://oaitriton.blob.core.windows.net/public/llvm-builds"
        provide(f"{base}/{name}.tar.gz", cache / "llvm" / name)
    if not json_folder:
        version = (CMAKE / "json-version.txt").read_text().strip()
        base = "https://github.com/nlohmann/json/releases/download"
        provide(f"{base}/{version}/include.zip", cache / "json")
    machine = "sbsa" if platform.machine() == "aarch64" else platform.machine()
    versions = json.loads((CMAKE / "nvidia-toolchain-version.json").read_text())
    for key, version in versions.items():
        part = {"cudacrt": "cuda_crt"}.get(key, "cuda_nvcc")
        file = f"{part}-linux-{machine}-{version}-archive.tar.xz"
        provide(f"{NVIDIA}/{part}/linux-{machine}/{file}", cache / "nvidia" / key)
    print(llvm or cache / "llvm" / name / name, end="")


main(Path(sys.argv[1]), *sys.argv[2:])
