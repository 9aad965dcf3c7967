import base64
import contextlib
import functools
import http.server
import threading
from pathlib import Path

import pytest

from workspace.core.errors import BuildError, SourceError, ToolchainError
from workspace.machine import interpreter, toolchain


def install(house, settings, *arguments: str, **more) -> None:
    with house.run_log(settings) as run_log:
        interpreter.install(house.layout, settings, arguments, run_log=run_log, **more)


def test_installed_names_are_canonical_and_half_removed_packages_are_not_counted(house, built):
    settings = built()
    house.wheel("Some.Thing_here", "1.0+local")
    install(house, settings, "some-thing-here")
    gone = (
        next((house.layout.environment / "lib").glob("python*/site-packages"))
        / "gone-2.0.dist-info"
    )
    gone.mkdir()
    assert interpreter.installed(house.layout) == {"some-thing-here": "1.0+local"}


def test_packages_of_a_former_python_are_not_counted(house, built):
    built()
    old = house.layout.environment / "lib" / "python3.7" / "site-packages" / "old-1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").touch()
    assert interpreter.installed(house.layout) == {}


def test_constraints_and_overrides_bind_and_the_command_in_the_log_can_be_copied(house, built):
    settings = built()
    for version in ("1.0", "2.0"):
        house.wheel("leaf", version)
    house.wheel("unwanted", "1.0")
    house.wheel("root", "1.0", requires=("leaf", "unwanted"))
    install(
        house,
        settings,
        "root",
        constraints=("leaf<2",),
        overrides=('unwanted ; sys_platform == "never"',),
    )
    assert interpreter.installed(house.layout) == {"leaf": "1.0", "root": "1.0"}
    command = next(
        line
        for line in house.log().splitlines()
        if line.startswith("+ cd ") and "pip install" in line
    )
    assert "'" in command
    assert (house.layout.state / "constraints.txt").read_text() == "leaf<2\n"


def test_version_that_no_index_has_is_a_source_error(house, built):
    settings = built()
    house.wheel("leaf", "1.0")
    for arguments in (
        ("--no-index", "leaf==9"),
        ("--no-index", "leaf>=9"),
        ("--no-index", "nothing-of-this-name"),
    ):
        with pytest.raises(SourceError, match=r"the package index has no (leaf|nothing)"):
            install(house, settings, *arguments)


def test_no_network_is_a_source_error_with_a_hint(house, built):
    built()
    for settings in (
        house.settings(),
        house.settings(
            UV_OFFLINE="0", UV_DEFAULT_INDEX="http://127.0.0.1:9/simple", UV_HTTP_RETRIES="0"
        ),
    ):
        with pytest.raises(SourceError, match="could not be reached") as caught:
            install(house, settings, "not-here")
        is_offline = settings.shell["UV_OFFLINE"] == "1"
        assert ("unset UV_OFFLINE" if is_offline else "checks the network") in caught.value.hint


def test_contradiction_is_a_build_error_and_not_blamed_on_the_index(house, built):
    settings = built()
    house.wheel("leaf", "1.0")
    house.wheel("leaf", "2.0")
    house.wheel("root", "1.0", requires=("leaf==2.0",))
    with pytest.raises(BuildError):
        install(house, settings, "root==1.0", constraints=("leaf==1.0",))


@pytest.mark.parametrize(
    ("output", "error", "sentence"),
    [
        (
            (
                "error: Failed to install: x.whl\n  cause: failed to copy file: No space left on"
                " device (os error 28)"
            ),
            ToolchainError,
            "disk is full",
        ),
        (
            "error: failed to create file `/a`: Read-only file system (os error 30)",
            ToolchainError,
            "is not writable",
        ),
        (
            (
                "error: Failed to install\n  cause: failed to create directory `/a`: Permission"
                " denied (os error 13)"
            ),
            ToolchainError,
            "is not writable",
        ),
        (
            (
                "  × Failed to build `x`\n  ╰─▶ Because x was not found in the package registry and"
                " you require x"
            ),
            SourceError,
            "has no x",
        ),
        ("No space left on device is what this line talks about", BuildError, "exited with 2"),
        ("gcc: dns error in a comment", BuildError, "exited with 2"),
    ],
)
def test_failures_of_uv_are_classified_by_its_output(house, output, error, sentence):
    house.layout.tools.joinpath("bin", "uv").unlink()
    house.program("uv", f"cat <<'END'\n{output}\nEND\nexit 2", folder=house.layout.tools / "bin")
    with pytest.raises(error, match=sentence):
        install(house, house.settings(), "x")


def test_output_of_a_compiler_is_not_classified_except_a_full_disk(house):
    house.layout.tools.joinpath("bin", "uv").unlink()
    uv = house.program(
        "uv",
        "echo 'error: Permission denied (os error 13)'; exit 1",
        folder=house.layout.tools / "bin",
    )
    with pytest.raises(BuildError):
        install(house, house.settings(), "x", phase_env={})
    uv.write_text(
        "#!/bin/sh\necho 'a.cu: fatal error: error writing to /tmp/x.s: No space left on device';"
        " exit 1\n"
    )
    with pytest.raises(ToolchainError, match="disk is full"):
        install(house, house.settings(), "x", phase_env={})


def test_build_gets_build_settings_and_no_secret_and_an_installation_no_settings(house):
    house.layout.tools.joinpath("bin", "uv").unlink()
    house.program(
        "uv",
        'echo "jobs=$MAX_JOBS token=$MY_TOKEN extra=$CARGO"',
        folder=house.layout.tools / "bin",
    )
    settings = house.settings(MAX_JOBS="3", MY_TOKEN="s3cret-word")
    lines: list[str] = []
    install(house, settings, "x", phase_env={"CARGO": "1"}, on_line=lines.append)
    install(house, settings, "x", on_line=lines.append)
    assert lines == ["jobs=3 token= extra=1", "jobs= token=s3cret-word extra="]
    assert "s3cret-word" not in house.log()


class _Index(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        credentials = self.headers.get("Authorization", "")
        if credentials != "Basic " + base64.b64encode(b"me:open sesame").decode():
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic")
            self.end_headers()
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_password_of_an_index_reaches_the_index_but_neither_screen_nor_log(
    house, built, tmp_path: Path
):
    built()
    simple = tmp_path / "www" / "simple" / "leaf"
    house.wheel("leaf", "1.0", folder=simple)
    (simple / "index.html").write_text(
        '<a href="leaf-1.0-py3-none-any.whl">leaf-1.0-py3-none-any.whl</a>'
    )
    handler = functools.partial(_Index, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            settings = house.settings(UV_OFFLINE="0", UV_FIND_LINKS="")
            install(
                house,
                settings,
                "--index",
                f"http://me:open%20sesame@127.0.0.1:{server.server_port}/simple",
                "leaf",
            )
        finally:
            server.shutdown()
    assert interpreter.installed(house.layout) == {"leaf": "1.0"}
    assert "sesame" not in house.log()


def test_index_that_refuses_the_password_is_not_reported_to_lack_the_package(house):
    house.layout.tools.joinpath("bin", "uv").unlink()
    refused = (
        "hint: An index URL (http://x/simple) could not be queried due to a lack of valid"
        " authentication credentials (401 Unauthorized)"
    )
    script = (
        "echo '  cause: Because leaf was not found in the package registry and you require leaf';"
        f" echo '{refused}'; exit 1"
    )
    house.program("uv", script, folder=house.layout.tools / "bin")
    with pytest.raises(SourceError, match="401 Unauthorized"):
        install(house, house.settings(), "leaf")


class _Dripping(http.server.BaseHTTPRequestHandler):
    """An index that sends a byte every tenth of a second, of a page that never ends."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        with contextlib.suppress(OSError):
            while not self.server.is_over.wait(0.1):
                self.wfile.write(b" ")
                self.wfile.flush()

    def log_message(self, *_):
        pass


def test_index_that_drips_is_given_up_and_named(house, built, monkeypatch):
    built()
    monkeypatch.setattr(toolchain, "STALL_S", 2.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Dripping) as server:
        server.is_over = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index = f"http://127.0.0.1:{server.server_port}/simple"
        settings = house.settings(UV_OFFLINE="0", UV_FIND_LINKS="", UV_DEFAULT_INDEX=index)
        with pytest.raises(SourceError) as failure:
            install(house, settings, "leaf==1.0")
        server.is_over.set()
        server.shutdown()
    assert failure.value.message == (
        f"the package index answers too slowly: uv did nothing for 2 s while it waited for {index}"
    )
    assert (failure.value.hint or "").startswith("./scripts/inv doctor ")


@contextlib.contextmanager
def index_without_dates(folder):
    """Serve an index with a wheel of leaf 1.0, which does not say when it was uploaded."""
    name = "leaf-1.0-py3-none-any.whl"
    (folder / "www/simple/leaf/index.html").write_text(f'<a href="{name}">{name}</a>')
    handler = functools.partial(_Index, directory=str(folder / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://me:open%20sesame@127.0.0.1:{server.server_port}/simple"
        server.shutdown()


@pytest.mark.parametrize(
    ("variable", "value", "toml"),
    [
        ("UV_EXCLUDE_NEWER", "2024-01-01", 'exclude-newer = "2024-01-01"'),
        ("UV_EXCLUDE_NEWER", "soon", 'exclude-newer = "1 day"'),
        # The variable never reaches uv.
        (None, "", "[pip]\nrequire-hashes = true"),
        (None, "", "no-index = true"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_setting_of_uv_that_leaves_a_version_out_is_named_and_not_the_index(
    house, built, variable, value, toml, in_file, tmp_path
):
    built()
    house.wheel("leaf", "1.0", folder=tmp_path / "www" / "simple" / "leaf")
    if in_file or variable is None:
        folder = tmp_path / "config" / "uv"
        folder.mkdir(parents=True)
        (folder / "uv.toml").write_text(toml + "\n")
        shell, place = {"XDG_CONFIG_HOME": str(tmp_path / "config")}, str(folder / "uv.toml")
    else:
        shell, place = {variable: value}, variable
    settings = house.settings(UV_OFFLINE="0", UV_FIND_LINKS="", **shell)
    with index_without_dates(tmp_path) as url, pytest.raises(ToolchainError) as failure:
        install(house, settings, "--default-index", url, "leaf==1.0")
    assert f"({place}): " in failure.value.message
    assert "index has no" not in failure.value.message
    assert place in failure.value.hint


def test_constraint_of_the_user_is_named_as_a_guess(house, built, tmp_path):
    built()
    house.wheel("leaf", "1.0")
    folder = tmp_path / "config" / "uv"
    folder.mkdir(parents=True)
    (folder / "uv.toml").write_text('constraint-dependencies = ["leaf<1"]\n')
    settings = house.settings(XDG_CONFIG_HOME=str(tmp_path / "config"))
    with pytest.raises(BuildError) as failure:
        install(house, settings, "leaf==1.0")
    assert failure.value.message == (
        "uv finds no versions that fit: Because you require leaf==1.0 and leaf<1, we can conclude"
        " that your requirements are unsatisfiable."
        f" Your setting in {folder}/uv.toml may be the reason"
    )
    assert (failure.value.hint or "").startswith(f"grep -n dependencies {folder}/uv.toml    shows")
