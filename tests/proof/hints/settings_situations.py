"""Situations of .env, the pins and names that were typed."""

from tests.proof.hints.following import User, runs


@runs("core.begin_dotenv")
def dotenv_that_is_no_text(user: User) -> None:
    user.world.layout.dotenv.write_bytes(b"MAX_JOBS=\xff\xfe\n")
    user.edits_with('echo MAX_JOBS=2 > "$file"')
    user.follow("core.begin_dotenv", "env")


@runs("core.edit_dotenv")
def dotenv_whose_path_has_a_variable_that_is_not_set(user: User) -> None:
    user.world.layout.dotenv.write_text("MAX_JOBS=2\nHF_HOME=$NO_SUCH/models\n")
    user.edits_with('sed -i "${line}s/=.*/=models/" "$file"')
    user.follow("core.edit_dotenv", "env")
    assert user.world.layout.dotenv.read_text() == "MAX_JOBS=2\nHF_HOME=models\n"


@runs("core.quote_value")
def dotenv_with_a_line_that_is_no_setting(user: User) -> None:
    user.world.layout.dotenv.write_text("# mine\nCMAKE_ARGS='-DA=1\n")
    user.edits_with('sed -i "${line}s/.*/CMAKE_ARGS=-DA=1/" "$file"')
    user.follow("core.quote_value", "env")


@runs("core.new_dotenv")
def dotenv_that_is_a_folder(user: User) -> None:
    user.world.layout.dotenv.unlink(missing_ok=True)
    user.world.layout.dotenv.mkdir()
    (user.world.layout.dotenv / "mine").write_text("mine")
    user.follow("core.new_dotenv", "env")
    assert (user.root / ".env.old" / "mine").read_text() == "mine"


@runs("core.list_dotenv")
def dotenv_that_points_nowhere(user: User) -> None:
    user.world.layout.dotenv.unlink(missing_ok=True)
    user.world.layout.dotenv.symlink_to(".env")
    user.look("core.list_dotenv", "env", shows=r"\.env -> ")


@runs("core.without_bom")
def dotenv_with_a_byte_order_mark(user: User) -> None:
    user.world.layout.dotenv.write_bytes(b"\xef\xbb\xbfMAX_JOBS=2\n")
    user.follow("core.without_bom", "env")
    assert user.world.layout.dotenv.read_bytes() == b"MAX_JOBS=2\n"


@runs("core.without_cr")
def dotenv_of_windows(user: User) -> None:
    user.world.layout.dotenv.write_bytes(b"MAX_JOBS=2\r\n# mine\r\n")
    user.follow("core.without_cr", "env")
    assert user.world.layout.dotenv.read_bytes() == b"MAX_JOBS=2\n# mine\n"


@runs("core.valid_value")
def shell_with_a_value_that_nothing_accepts(user: User) -> None:
    command = user.meets("core.valid_value", "status", MAX_JOBS="many")
    ended = user.type(f"{command} && ./scripts/inv env", MAX_JOBS="many")
    assert ended.code == 0, ended.output
    user.followed.add("core.valid_value")


@runs("core.restore_pins")
def pins_that_are_no_toml(user: User) -> None:
    user.world.layout.pins.write_text("[vllm\n")
    user.follow("core.restore_pins", "patch")
    assert user.git("show", "stash@{0}:vendor/pins.toml") == "[vllm"


@runs("machine.drop_line")
def dotenv_that_sets_a_name_twice(user: User) -> None:
    user.world.layout.dotenv.write_text("MAX_JOBS=2\nNVCC_THREADS=1\nMAX_JOBS=3\n")
    user.follow("machine.drop_line", "env.check")
    kept = "# MAX_JOBS=2\nNVCC_THREADS=1\nMAX_JOBS=3\n"
    assert user.world.layout.dotenv.read_text() == kept


@runs("repo.newer_releases", "inv.pin_show", "repo.forecast_example")
def names_that_are_no_release(user: User) -> None:
    user.look("repo.newer_releases", "pin.forecast", "no-such-branch", shows="newer")
    user.look("inv.pin_show", "pin.forecast", "v0.31.1", shows="newer")
    command = user.meets("repo.forecast_example", "pin.forecast", "a b")
    assert "has no" in user.type(command).err
    user.followed.add("repo.forecast_example")


@runs("cli.list", "cli.help_of", "cli.alike", "cli.help", "cli.help_continue")
def command_lines_that_are_wrong(user: User) -> None:
    user.look("cli.list", "no.such.verb", shows="bootstrap")
    user.look("cli.help_of", "rebuild", "--no-such-flag", shows="--jobs")
    user.look("cli.alike", "statsu", shows="status")
    user.look("cli.help", "--no-such-flag", shows="Usage")
    user.look("cli.help_continue", "patch.continue", "--skip", "--abort", shows="--abort")


@runs("cli.as_flag")
def value_without_its_flag(user: User) -> None:
    user.follow("cli.as_flag", "doctor", "cpu", then=False)
