"""Make .workspace/tools, the environment that `inv` and `nox` run in: whole or not at all.

Started by scripts/inv and scripts/nox with whatever python3 there is, before anything of ours can
be imported: standard library only, syntax of Python 3.6. Of the user's pip and uv settings those
that say where packages come from are kept, the others dropped; with `bootstrap --from FOLDER`, all
packages come from that bundle.
"""

# Until main catches it, ^C ends the process as the system does it: without a traceback.
import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import configparser
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
STATE = os.path.join(ROOT, ".workspace")
TOOLS = os.path.join(STATE, "tools")
PRIVATE_UV = os.path.join(STATE, "uv")
REQUIREMENTS = os.path.join(ROOT, "requirements", "tools.txt")

# workspace/core/errors.py: a flag cannot be used; the machine lacks something; something could not
# be fetched.
SETTINGS, MACHINE, FETCH = 2, 6, 11
OLDEST_PYTHON = (3, 11)
PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11")
# The first uv with `venv --relocatable` and today's names of the index options.
OLDEST_UV = (0, 5)
SHOWN_LINES = 12
# An index that sends a byte a second never runs into UV_HTTP_TIMEOUT.
LONGEST_S = 1800
CHECK_INDEX = (
    "check the network and the package index (`pip config list`), then run the same command again"
)

# What says where packages come from, how to get there and where to keep them; the rest of UV_* and
# PIP_* says what to install where.
_UV_KEPT = re.compile(
    r"UV_(DEFAULT_INDEX|INDEX.*|EXTRA_INDEX_URL|FIND_LINKS|NO_INDEX|KEYRING_PROVIDER|INSECURE_HOST"
    r"|NATIVE_TLS|SYSTEM_CERTS|HTTP_.*|REQUEST_TIMEOUT"
    r"|CACHE_DIR|NO_CACHE|LINK_MODE|OFFLINE|CONFIG_FILE|NO_CONFIG|CONCURRENT_.*|CREDENTIALS_DIR"
    r"|PYTHON_INSTALL_.*|PYTHON_DOWNLOADS.*)$"
)
_PIP_KEPT = re.compile(
    r"PIP_(INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|NO_INDEX|TRUSTED_HOST|CERT|CLIENT_CERT|PROXY"
    r"|TIMEOUT|DEFAULT_TIMEOUT|RETRIES|CACHE_DIR|NO_CACHE_DIR"
    r"|CONFIG_FILE|KEYRING_PROVIDER|USE_FEATURE|DISABLE_PIP_VERSION_CHECK)$"
)
_DROPPED = re.compile(r"(PYTHON.*|VIRTUAL_ENV.*|CONDA_.*|UV_.*|PIP_.*|__PYVENV_LAUNCHER__)$")


class Failure(Exception):
    """A sentence, the way on, and the exit code."""

    def __init__(self, code, message, hint, details=()):
        super().__init__(message)
        self.code, self.message, self.hint, self.details = code, message, hint, details


def main():
    """Make the environment unless it is complete, and return the exit code."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            prepare()
        except OSError as exc:
            sentence = "{} cannot be written: {}".format(exc.filename or STATE, exc.strerror)
            raise Failure(
                MACHINE, sentence, "df -h {0}; ls -ld {0}".format(shlex.quote(ROOT))
            ) from exc
    except Failure as exc:
        for line in exc.details:
            info("  " + line)
        info("error: " + exc.message)
        info("hint: " + exc.hint)
        return exc.code
    except KeyboardInterrupt:
        info("interrupted")
        return 130
    return 0


def prepare():
    """Build what is missing, one process at a time."""
    if not os.path.isfile(REQUIREMENTS):
        raise Failure(
            MACHINE,
            "requirements/tools.txt is not there: the clone is incomplete",
            "git -C {} checkout -- requirements/tools.txt".format(ROOT),
        )
    os.makedirs(STATE, exist_ok=True)
    with open(os.path.join(STATE, "tools.lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            info("another process is preparing the tool environment; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete():
            return
        started = time.time()
        info("preparing the tool environment …", end="")
        try:
            remove_leftovers()
            bundle = bundle_of(sys.argv[1:])
            if bundle is None:
                (environment, index), python = package_sources(), find_python()
            else:
                environment, index, python = bundled_sources(bundle)
            build(
                find_uv(environment) or install_uv(python, environment), python, environment, index
            )
        except BaseException:
            info("")
            raise
        finally:
            remove_leftovers()
        info(" {:.1f} s".format(time.time() - started))


def is_complete():
    """Return whether TOOLS was made from the current requirements; scripts/inv compares with
    cmp.
    """
    try:
        with open(REQUIREMENTS, "rb") as file:
            wanted = file.read()
        with open(os.path.join(TOOLS, "requirements.txt"), "rb") as file:
            is_same = file.read() == wanted
        return is_same and os.access(os.path.join(TOOLS, "bin", "python"), os.X_OK)
    except OSError:
        return False


def build(uv, python, environment, index):
    """Make the environment beside TOOLS, prove it, write what it was made from last, and put it in
    place.
    """
    new = os.path.join(STATE, "tools.new-{}".format(os.getpid()))
    oldest = ">={}.{}".format(*OLDEST_PYTHON)
    venv = [uv, "venv", "--quiet", "--relocatable", "--python", python or oldest, new]
    none = "no Python {}.{} or newer could be found or fetched".format(*OLDEST_PYTHON)
    call(venv, environment, MACHINE, none, "sudo apt-get install python3.12 python3.12-venv")
    interpreter = os.path.join(new, "bin", "python")
    install = [uv, "pip", "install", "--quiet", "--python", interpreter]
    install += ["--require-hashes", "--no-build", "-r", REQUIREMENTS]
    call(install + index, environment, FETCH, "the tools could not be installed", CHECK_INDEX)
    imports = [interpreter, "-Es", "-c", "import invoke, nox"]
    call(
        imports,
        environment,
        MACHINE,
        "the tools were installed but cannot be imported",
        "run the same command again",
    )
    shutil.copyfile(REQUIREMENTS, os.path.join(new, "requirements.txt"))
    if os.path.lexists(TOOLS):
        os.rename(TOOLS, os.path.join(STATE, "tools.old-{}".format(os.getpid())))
    os.rename(new, TOOLS)


def find_python():
    """Return an interpreter that is new enough, or None: uv then looks for one in its own
    places.
    """
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return sys.executable
    for name in PYTHONS:
        path = shutil.which(name)
        if path and run([path, "-Es", "-c", ""], None)[0] == 0:
            return path
    return None


def find_uv(environment):
    """Return a uv that runs and is new enough, from PATH or from an earlier call."""
    for path in (shutil.which("uv"), os.path.join(PRIVATE_UV, "bin", "uv")):
        if path and os.access(path, os.X_OK):
            status, text = run([path, "--version"], environment)
            found = re.match(r"uv (\d+)\.(\d+)", text)
            if status == 0 and found and (int(found.group(1)), int(found.group(2))) >= OLDEST_UV:
                return path
    return None


def install_uv(python, environment):
    """Install the locked uv from the index into PRIVATE_UV, with venv or, as on Ubuntu without
    python3-venv, with pip alone.
    """
    python = python or sys.executable
    new = os.path.join(STATE, "uv.new-{}".format(os.getpid()))
    wanted = new + ".txt"
    with open(REQUIREMENTS) as file, open(wanted, "w") as only:
        entry = re.search(r"^uv==(?:.*\\\n)*.*\n?", file.read(), re.MULTILINE)
        only.write(entry.group(0) if entry else "uv\n")
    install = ["-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps"]
    install += ["--only-binary", ":all:", "-r", wanted]
    environment = dict(environment, PIP_USER="0", PIP_REQUIRE_VIRTUALENV="0")
    install_into(new, python, install, environment)
    call(
        [os.path.join(new, "bin", "uv"), "--version"],
        environment,
        MACHINE,
        "the installed uv does not run",
        "install uv yourself and run the same command again",
    )
    shutil.rmtree(PRIVATE_UV, ignore_errors=True)
    os.rename(new, PRIVATE_UV)
    return os.path.join(PRIVATE_UV, "bin", "uv")


def install_into(new, python, install, environment):
    """Run the pip command `install` for the folder `new`, with venv or with pip alone."""
    sentence = "uv could not be installed"
    if run([python, "-Es", "-m", "venv", new], environment)[0] == 0:
        call(
            [os.path.join(new, "bin", "python"), "-Es"] + install,
            environment,
            FETCH,
            sentence,
            CHECK_INDEX,
        )
    elif run([python, "-Es", "-m", "pip", "--version"], environment)[0] == 0:
        shutil.rmtree(new, ignore_errors=True)
        call(
            [python, "-Es"] + install + ["--target", new], environment, FETCH, sentence, CHECK_INDEX
        )
    else:
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        raise Failure(
            MACHINE,
            "{} has neither venv nor pip, and there is no uv on PATH".format(python),
            "sudo apt-get install {}".format(package),
        )


def package_sources():
    """Return the environment for pip and uv, and the options that give uv pip's index settings."""
    environment = {}
    for name, text in os.environ.items():
        if _UV_KEPT.match(name) or _PIP_KEPT.match(name) or not _DROPPED.match(name):
            environment[name] = text
    if not environment.get("UV_CACHE_DIR") and not can_write(
        environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    ):
        # As core/paths.py decides it for every later uv.
        environment["UV_CACHE_DIR"] = os.path.join(STATE, "cache", "uv")
    pip = pip_settings(environment)
    for name, key in (
        ("SSL_CERT_FILE", "cert"),
        ("SSL_CLIENT_CERT", "client-cert"),
        ("UV_HTTP_TIMEOUT", "timeout"),
        ("ALL_PROXY", "proxy"),
    ):
        if pip.get(key) and name not in environment:
            environment[name] = pip[key]
    options = []
    if not has_uv_index(environment):
        options += (
            ["--no-index"] if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") else []
        )
        options += ["--default-index=" + pip["index-url"]] if pip.get("index-url") else []
        extra = pip.get("extra-index-url", "").split()
        options += ["--index=" + url for url in extra]
        # As pip does: any index may have the locked version. The hashes keep strangers out.
        options += ["--index-strategy=unsafe-best-match"] if extra else []
    if "UV_FIND_LINKS" not in environment:
        options += ["--find-links=" + place for place in pip.get("find-links", "").split()]
    options += ["--allow-insecure-host=" + host for host in pip.get("trusted-host", "").split()]
    return environment, options


def bundle_of(argv):
    """Return the folder of `inv bootstrap --from FOLDER`, None without the flag."""
    for number, arg in enumerate(argv if "bootstrap" in argv else []):
        if arg.startswith("--from=") or (arg == "--from" and argv[number + 1 :]):
            folder = arg[7:] or argv[number + 1]
            return os.path.realpath(os.path.expanduser(folder))
    return None


def bundled_sources(bundle):
    """Return environment and options that take packages from a bundle alone, after a check of its
    tools, and a Python that its wheels are for: see workspace/install/bundle.py.
    """
    folder = os.path.join(bundle, "files")
    try:
        with open(os.path.join(bundle, "manifest.json"), encoding="utf-8") as file:
            manifest = json.load(file)
        items, target = manifest["items"], manifest["target"]
        tools = [item for item in items if "tools" in item["uses"]]
        wrong = [item["name"] for item in tools if not is_as_listed(folder, item)]
        if not re.match(r"3\.[0-9]{1,2}$", target["python"]):
            raise ValueError("its Python is not a version")
        python = "python" + target["python"]
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise Failure(
            SETTINGS,
            "{} is not the folder of a finished bundle: {}".format(bundle, exc),
            "ls -l {}".format(shlex.quote(bundle)),
        ) from exc
    if wrong:
        raise Failure(
            FETCH,
            "the bundle is not as its manifest: {} is missing, cut or changed".format(wrong[0]),
            "copy {} again".format(shlex.quote(os.path.join(folder, wrong[0]))),
        )
    environment = {
        name: text
        for name, text in os.environ.items()
        if not _DROPPED.match(name) or name in ("UV_CACHE_DIR", "UV_LINK_MODE")
    }
    environment.update(UV_OFFLINE="1", UV_NO_CONFIG="1", PIP_CONFIG_FILE=os.devnull)
    environment.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=folder)
    options = ["--no-index", "--find-links=" + folder]
    return environment, options, shutil.which(python) or find_python()


def is_as_listed(folder, item):
    """Return whether a file of a bundle has the SHA-256 of its manifest."""
    if not re.match(r"[A-Za-z0-9][A-Za-z0-9._+!-]*$", item["name"]):
        return False
    path = os.path.join(folder, item["name"])
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest() == item["sha256"]


def can_write(folder):
    """Return whether a folder, or the nearest one above it that exists, can be written."""
    while folder and not os.path.lexists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return os.access(folder, os.W_OK | os.X_OK)


def pip_settings(environment):
    """Return what pip would take from its files and PIP_*:
    https://pip.pypa.io/en/stable/topics/configuration/.
    """
    home = os.path.expanduser("~")
    files = [environment.get("PIP_CONFIG_FILE", "")]
    if files[0] != os.devnull:
        files += [
            os.path.join(folder, "pip", "pip.conf")
            for folder in environment.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")
        ]
        files += ["/etc/pip.conf", os.path.join(home, ".pip", "pip.conf")]
        files += [
            os.path.join(
                environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"),
                "pip",
                "pip.conf",
            ),
            os.path.join(sys.prefix, "pip.conf"),
        ]
    settings = {}
    for path in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue
        for section in ("global", "install"):
            if parser.has_section(section):
                settings.update(
                    (key.replace("_", "-"), text) for key, text in parser.items(section)
                )
    for name, text in environment.items():
        if name.startswith("PIP_") and text:
            settings[name[4:].lower().replace("_", "-").replace("default-timeout", "timeout")] = (
                text
            )
    return settings


def has_uv_index(environment):
    """Return whether the user configured an index for uv itself; pip's settings then do not
    count.
    """
    if any(
        environment.get(name)
        for name in (
            "UV_DEFAULT_INDEX",
            "UV_INDEX",
            "UV_INDEX_URL",
            "UV_EXTRA_INDEX_URL",
            "UV_NO_INDEX",
        )
    ):
        return True
    own = os.path.join(
        environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "uv", "uv.toml"
    )
    for path in (environment.get("UV_CONFIG_FILE", ""), own, "/etc/uv/uv.toml"):
        try:
            with open(path, encoding="utf-8") as file:
                if re.search(
                    r"^\s*(\[\[index\]\]|(extra-)?index(-url)?\s*=|no-index\s*=)",
                    file.read(),
                    re.MULTILINE,
                ):
                    return True
        except (OSError, UnicodeDecodeError):
            continue
    return False


def call(argv, environment, code, sentence, hint):
    """Run a program that must succeed."""
    status, text = run(argv, environment)
    if status == 0:
        return
    # Addresses may hold a password.
    lines = tuple(re.sub(r"//[^/@\s]+@", "//****@", text).strip().splitlines()[-SHOWN_LINES:])
    if re.search(
        r"no space left|read-only file system|permission denied|disk quota", text, re.IGNORECASE
    ):
        raise Failure(MACHINE, sentence, "df -h {0}; ls -ld {0}".format(shlex.quote(STATE)), lines)
    raise Failure(code, sentence, hint, lines)


def run(argv, environment):
    """Run a program to its end and return its status and output; it ends with this process."""
    try:
        child = subprocess.Popen(
            argv,
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as exc:
        return 127, str(exc)
    try:
        text = child.communicate(timeout=LONGEST_S)[0]
    except BaseException as exc:
        child.terminate()
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if not isinstance(exc, subprocess.TimeoutExpired):
            raise
        slow = "{} had not ended after {} s; the package index is {}"
        name = os.path.basename(argv[0])
        return 124, slow.format(name, LONGEST_S, index_of(argv, environment))
    return child.returncode, text.decode("utf-8", "replace")


def index_of(argv, environment):
    """Return the package index that a command line of uv or pip asks."""
    options = [arg.partition("=")[2] for arg in argv if arg.startswith("--default-index=")]
    names = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
    options += [environment[name] for name in names if environment.get(name)]
    return options[0] if options else "the default of uv and pip"


def remove_leftovers():
    """Remove what an interrupted call left; under the lock nobody else is at work on it."""
    for name in os.listdir(STATE):
        if re.match(r"(tools|uv)\.(new|old)-", name):
            path = os.path.join(STATE, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)


def info(text, end="\n"):
    """Talk on stderr, in whatever encoding it has."""
    encoding = sys.stderr.encoding or "ascii"
    sys.stderr.write((text + end).encode(encoding, "replace").decode(encoding))
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
